"""The callback for Lightning, with the real library."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from st3_torch import Sparsifier
from st3_torch.lightning import SparsifierCallback
from tests.st3_torch.networks import ramp, small_net

pytestmark = pytest.mark.filterwarnings(
    "default:::lightning", "ignore:.*does not have many workers", "ignore:.*LeafSpec:FutureWarning"
)


class Module(LightningModule):
    def __init__(self, optimizers=1):
        super().__init__()
        self.net = small_net()
        self.automatic_optimization = optimizers == 1
        self.count = optimizers

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch, index):
        images, labels = batch
        loss = nn.functional.cross_entropy(self(images), labels)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, index):
        self.log("other_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch, index):
        self.log("zeros", (self.net[6].weight == 0).float().mean())

    def configure_optimizers(self):
        made = [torch.optim.AdamW(self.parameters(), lr=0.01) for _ in range(self.count)]
        return made if self.count > 1 else made[0]


def data():
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(64, 1, 6, 6, generator=generator), torch.randint(3, (64,), generator=generator)
    return DataLoader(TensorDataset(images, labels), batch_size=8)  # eight batches


def trainer(folder, *callbacks, **options):
    seed_everything(0, verbose=False)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    options = {**quiet, "default_root_dir": folder, "enable_checkpointing": False, **options}
    return Trainer(callbacks=list(callbacks), **options)


def fitted(folder, schedule, module=None, ckpt_path=None, loader=None, saving=None, **options):
    callback, module = SparsifierCallback(schedule), module or Module()
    trainer(folder, callback, *([saving] if saving else []), **options).fit(
        module, loader or data(), ckpt_path=ckpt_path
    )
    return callback.sparsifier, module


def test_trains_like_a_plain_loop(tmp_path):
    sp, module = fitted(tmp_path, ramp(0.9, end=10), max_epochs=2)
    seed_everything(0, verbose=False)
    other = Module()
    optimizer, plain = other.configure_optimizers(), Sparsifier(other, ramp(0.9, end=10))
    for images, labels in [*data(), *data()]:
        optimizer.zero_grad()
        nn.functional.cross_entropy(other(images), labels).backward()
        optimizer.step()
        plain.step()
    assert sp.step_count == 16
    assert sp.thresholds == plain.thresholds
    assert list(sp.thresholds) == ["net.0.weight", "net.3.weight", "net.6.weight"]
    assert sp.finalize() is module
    plain.finalize()
    assert all(map(torch.equal, module.state_dict().values(), other.state_dict().values()))


class ResumableData:
    """Batches that know where they are; Lightning repeats those of the others after a stop within an epoch."""

    def __init__(self):
        self.batches, self.next = list(data()), 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        for index in range(self.next % len(self.batches), len(self.batches)):
            self.next = index + 1
            yield self.batches[index]

    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state):
        self.next = state["next"]


@pytest.mark.parametrize("make_data", [data, ResumableData])
def test_resumes_bit_for_bit(tmp_path, make_data):
    schedule, steps = ramp(0.9, end=10), 8 if make_data is data else 5
    whole, module = fitted(tmp_path, schedule, loader=make_data(), max_epochs=3)
    keep = {"enable_checkpointing": True, "max_steps": steps}
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=steps)
    trainer(tmp_path, SparsifierCallback(schedule), saver, **keep).fit(Module(), make_data())
    checkpoint = tmp_path / f"step={steps}.ckpt"
    resumed, other = fitted(tmp_path, schedule, ckpt_path=checkpoint, loader=make_data(), max_epochs=3)
    assert (whole.step_count, resumed.step_count) == (24, 24)
    assert whole.thresholds == resumed.thresholds
    assert all(map(torch.equal, module.state_dict().values(), other.state_dict().values()))


def test_another_schedule_is_rejected(tmp_path):
    callback = SparsifierCallback(ramp(0.9, end=10))
    first = trainer(tmp_path, callback, max_steps=2)
    first.fit(Module(), data())
    first.save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"schedule.end_step=10, but this Sparsifier has 11"):
        fitted(tmp_path, ramp(0.9, end=11), ckpt_path=tmp_path / "x.ckpt", max_steps=4)


def test_a_checkpoint_is_tested_sparse(tmp_path):
    first = trainer(tmp_path, SparsifierCallback(ramp(0.9, end=2)), max_steps=4)
    first.fit(Module(), data())
    first.save_checkpoint(tmp_path / "x.ckpt")
    callback = SparsifierCallback(ramp(0.9, end=2))
    (found,) = trainer(tmp_path, callback).test(Module(), data(), ckpt_path=tmp_path / "x.ckpt", verbose=False)
    assert found["zeros"] == pytest.approx(callback.sparsifier.report().layers[2].sparsity)
    assert callback.sparsifier.sparsity == pytest.approx(0.9, abs=2e-3)


def test_a_checkpoint_of_weights_alone_is_refused(tmp_path):
    saving = ModelCheckpoint(tmp_path, filename="weights", save_weights_only=True)
    fitted(tmp_path, ramp(), module := Module(), max_epochs=1, enable_checkpointing=True, saving=saving)
    path = str(tmp_path / "weights.ckpt")
    for run in ("fit", "validate", "test", "predict"):
        made = trainer(tmp_path, SparsifierCallback(ramp()), max_epochs=2)
        with pytest.raises(ValueError, match=r"ckpt_path must have the Sparsifier's state, got .*weights.ckpt"):
            getattr(made, run)(Module(), data(), ckpt_path=path)
    assert module.net[6].weight.count_nonzero() < module.net[6].weight.numel()


def test_least_densities(tmp_path):
    callback = SparsifierCallback(ramp(), min_density={"net.0": 1.0})
    logger = CSVLogger(tmp_path, version=0)
    trainer(tmp_path, callback, max_epochs=2, logger=logger, log_every_n_steps=1).fit(Module(), data())
    logger.save()
    assert callback.sparsifier.thresholds["net.0.weight"] == 0
    assert callback.sparsifier.min_density == {"net.0.weight": 1.0, "net.3.weight": 0.0, "net.6.weight": 0.0}
    assert "threshold/net.6.weight" in (tmp_path / "lightning_logs/version_0/metrics.csv").read_text()


def test_accumulated_batches_do_not_count(tmp_path):
    sp, _ = fitted(tmp_path, ramp(), max_epochs=2, accumulate_grad_batches=4)
    assert sp.step_count == 4


class Overflowing(Module):
    """Its gradients overflow at two of eight steps."""

    def on_after_backward(self):
        if self.global_step in (2, 3):
            self.net[6].bias.grad[0] = float("inf")


def test_steps_that_the_scaler_skips_do_not_count(tmp_path):
    from lightning.pytorch.plugins import MixedPrecision

    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4.0))
    sp, _ = fitted(tmp_path, ramp(), Overflowing(), max_epochs=1, plugins=[plugin])
    assert sp.step_count == 6


def test_loggers_show_sparsity_and_thresholds(tmp_path):
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    sp, _ = fitted(tmp_path, ramp(0.9, end=10), max_epochs=2, logger=logger, log_every_n_steps=4)
    lines = [line.split(",") for line in (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().split()]
    rows = [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]
    sparse = [row for row in rows if row["sparsity"]]
    assert [int(row["step"]) for row in sparse] == [4, 8, 12, 16]
    assert [float(row["target_sparsity"]) for row in sparse] == [sp.schedule(step) for step in (4, 8, 12, 16)]
    assert float(sparse[-1]["sparsity"]) == sp.sparsity
    assert float(sparse[-1]["threshold"]) == sp.thresholds["net.6.weight"]


def test_accumulated_batches_are_not_logged_again(tmp_path):
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    seen, log = [], logger.log_metrics
    logger.log_metrics = lambda metrics, step: (
        seen.append(step) if "sparsity" in metrics else None,
        log(metrics, step),
    )
    fitted(tmp_path, ramp(), max_epochs=1, logger=logger, log_every_n_steps=1, accumulate_grad_batches=4)
    assert seen == [1, 2]


def test_fitting_twice_counts_once(tmp_path):
    callback, module = SparsifierCallback(ramp()), Module()
    for _ in range(2):
        trainer(tmp_path, callback, max_steps=3).fit(module, data())
    assert callback.sparsifier.step_count == 6
    callback.sparsifier.step()  # yours again, once fit has ended


def test_only_one_optimizer_may_train_the_kernels(tmp_path):
    with pytest.raises(ValueError, match=r"exactly one optimizer must train sparsified kernels, got 2"):
        fitted(tmp_path, ramp(), Module(optimizers=2), max_steps=1)


def test_options_reach_the_sparsifier(tmp_path):
    callback = SparsifierCallback(ramp(), "gmp", include=nn.Linear)
    assert callback.state_dict() == {}
    with pytest.raises(RuntimeError, match=r"there is no Sparsifier before Trainer.fit has begun"):
        callback.load_state_dict({})
    trainer(tmp_path, callback, max_steps=1).fit(Module(), data())
    assert callback.sparsifier.method.name == "gmp"
    assert list(callback.sparsifier.thresholds) == ["net.6.weight"]
