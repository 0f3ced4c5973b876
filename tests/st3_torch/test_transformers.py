"""The callback for the Trainer of Hugging Face Transformers, and GPT-2, with the real library."""

import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

import st3core
from st3_torch import Sparsifier
from st3_torch.transformers import SparsifierCallback
from tests.st3_torch.gpt2 import gpt2, sentences
from tests.st3_torch.networks import batch, ramp, small_net

pytestmark = pytest.mark.filterwarnings("default:::transformers", "default:::accelerate")

LAST = "transformer.h.1.mlp.c_fc.weight"
KERNELS = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]


def trainer(folder, *callbacks, model=None, **options):
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_steps": 4, "save_strategy": "no"}
    arguments = TrainingArguments(folder, max_steps=12, per_device_train_batch_size=4, **{**quiet, **options})
    data = {"train_dataset": sentences(), "eval_dataset": sentences(8)}
    return Trainer(model or gpt2(), arguments, **data, callbacks=list(callbacks))


def trained(folder, schedule, resume=None, **options):
    callback = SparsifierCallback(schedule)
    made = trainer(folder, callback, **options)
    made.train(resume_from_checkpoint=resume)
    return callback.sparsifier, made


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_gpt2_has_its_output_channels_on_axis_one():
    model = gpt2()
    raw = {f"{name}.weight": m.weight.detach().numpy().copy() for name, m in model.named_modules() if is_kernel(name)}
    sp = Sparsifier(model, ramp(0.7, end=1))
    sp.step()
    assert list(sp.thresholds) == list(raw)
    assert len(raw) == 8
    found = dict(model.named_modules())
    for name, weight in raw.items():
        expected = st3core.sparsify(weight, sp.thresholds[name], channel_axis=1)
        assert (found[name.removesuffix(".weight")].weight.detach().numpy() == expected).all()
    counted = sp.report(sentences(2)[0]["input_ids"][None]).layers
    assert [layer.dense_macs for layer in counted] == [12 * layer.weights for layer in counted]


def is_kernel(name):
    return any(name.endswith(kernel) for kernel in KERNELS)


def test_resumes_bit_for_bit(tmp_path):
    schedule = ramp(0.9, end=10)
    whole, first = trained(tmp_path, schedule, save_strategy="steps", save_steps=5)
    resumed, second = trained(tmp_path / "other", schedule, resume=str(tmp_path / "checkpoint-5"))
    assert (whole.step_count, resumed.step_count) == (12, 12)
    assert whole.thresholds == resumed.thresholds
    assert same(first.model.state_dict(), second.model.state_dict())
    states = [made.optimizer.state_dict()["state"] for made in (first, second)]
    assert all(torch.equal(states[0][i]["exp_avg"], states[1][i]["exp_avg"]) for i in states[0])


def test_a_finalized_model_is_saved_and_loaded_as_ever(tmp_path):
    sp, made = trained(tmp_path, ramp(0.9, end=10))
    sp.finalize().save_pretrained(tmp_path / "model")
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path / "model")
    assert same(loaded.state_dict(), made.model.state_dict())
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    words = sentences(2)[0]["input_ids"][None]
    assert torch.equal(loaded.eval()(words).logits, made.model.eval()(words).logits)


def test_another_schedule_is_rejected(tmp_path):
    trained(tmp_path, ramp(0.9, end=10), save_strategy="steps", save_steps=5)
    with pytest.raises(ValueError, match=r"schedule.end_step=10, but this Sparsifier has 11"):
        trained(tmp_path, ramp(0.9, end=11), resume=str(tmp_path / "checkpoint-5"))


def test_a_checkpoint_without_the_state_is_refused(tmp_path):
    trainer(tmp_path, save_strategy="steps", save_steps=5, model=(model := gpt2())).train()
    Sparsifier(model, ramp())  # a checkpoint of a sparsified model has other names
    with pytest.raises(ValueError, match="must have the Sparsifier's state, got one of step 5 without"):
        trained(tmp_path / "other", ramp(0.9, end=10), resume=str(tmp_path / "checkpoint-5"))


class SavesLate(TrainerCallback):
    """Decides to save after all others."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = state.global_step == 5


def test_a_save_that_others_ask_for_has_the_state(tmp_path):
    schedule, callback = ramp(0.9, end=10), SparsifierCallback(ramp(0.9, end=10))
    trainer(tmp_path, callback, SavesLate(), save_strategy="steps", save_steps=100).train()
    resumed, _ = trained(tmp_path / "other", schedule, resume=str(tmp_path / "checkpoint-5"))
    assert resumed.thresholds == callback.sparsifier.thresholds


def test_accumulated_batches_do_not_count(tmp_path):
    sp, made = trained(tmp_path, ramp(), gradient_accumulation_steps=2)
    assert sp.step_count == made.state.global_step == 12


class Overflow(TrainerCallback):
    """Lets the gradients of two steps overflow, before the scaler looks at them."""

    def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
        if state.global_step in (2, 3):
            optimizer.param_groups[0]["params"][0].grad[0] = float("inf")


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused"])
def test_steps_that_the_scaler_skips_do_not_count(tmp_path, optimizer):
    callback = SparsifierCallback(ramp())
    made = trainer(tmp_path, callback, Overflow(), max_grad_norm=0.0, optim=optimizer)
    made.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    made.train()
    assert made.state.global_step == 12
    assert callback.sparsifier.step_count == 10


class Seen(TrainerCallback):
    """A logger."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs, **kwargs):
        self.logs.append(dict(logs))


@pytest.mark.parametrize(("method", "key"), [("st3", "threshold"), ("st3_sigma", f"threshold/{LAST}")])
def test_loggers_show_sparsity_and_thresholds(tmp_path, method, key):
    callback, logger = SparsifierCallback(ramp(0.9, end=10), method), Seen()
    made = trainer(tmp_path, callback, logger)
    made.train()
    history = [entry for entry in made.state.log_history if "loss" in entry]
    for logs in (logger.logs[:3], history):
        assert [entry["target_sparsity"] for entry in logs] == [
            callback.sparsifier.schedule(step) for step in (4, 8, 12)
        ]
        assert logs[-1]["sparsity"] == callback.sparsifier.sparsity
        assert [entry[key] for entry in logs] == sorted({entry[key] for entry in logs})
    assert history[-1][key] == callback.sparsifier.thresholds[LAST]


def test_the_best_model_gets_its_thresholds_back(tmp_path):
    callback = SparsifierCallback(ramp(0.9, end=10))
    saving = {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4}
    made = trainer(tmp_path, callback, load_best_model_at_end=True, metric_for_best_model="loss", **saving)
    made.evaluate = lambda *_, **__: {"eval_loss": {4: 3.0, 8: 1.0, 12: 2.0}[made.state.global_step]}
    made.train()
    assert made.state.best_model_checkpoint.endswith("checkpoint-8")
    sp, count = callback.sparsifier, sum(layer.weights for layer in callback.sparsifier.report().layers)
    assert sp.step_count == 8
    assert sp.sparsity == (int((count - 1) * sp.schedule(8)) + 1) / count


def test_a_frozen_model_resumes(tmp_path):
    schedule = ramp(0.9, end=0)
    callback = SparsifierCallback(schedule)
    made = trainer(tmp_path, callback, save_strategy="steps", save_steps=5)
    callback.sparsifier.step()
    callback.sparsifier.freeze()
    made.train()
    assert isinstance(json.loads((tmp_path / "checkpoint-5/trainer_state.json").read_text()), dict)
    resumed, other = trained(tmp_path / "other", schedule, resume=str(tmp_path / "checkpoint-5"))
    state, expected = resumed.state_dict(), callback.sparsifier.state_dict()
    assert same(state.pop("masks"), expected.pop("masks"))
    assert state == expected
    assert state["frozen"]
    assert same(made.model.state_dict(), other.model.state_dict())


def test_two_trainers_share_a_callback(tmp_path):
    callback, model = SparsifierCallback(ramp()), gpt2()
    for _ in range(2):
        trainer(tmp_path, callback, model=model).train()
    assert callback.sparsifier.step_count == 24
    trainer(tmp_path, callback, model=gpt2()).train()
    assert callback.sparsifier.step_count == 12


def test_models_that_the_trainer_makes_anew_are_refused(tmp_path):
    arguments = TrainingArguments(tmp_path, max_steps=2, report_to="none", disable_tqdm=True, use_cpu=True)
    callbacks = [SparsifierCallback(ramp())]
    made = Trainer(args=arguments, train_dataset=sentences(), model_init=lambda: gpt2(), callbacks=callbacks)
    with pytest.raises(ValueError, match="Trainer must train the model that it was made with; use no model_init"):
        made.train()


def test_options_reach_the_sparsifier(tmp_path):
    callback = SparsifierCallback(ramp(), "gmp", include="*.mlp.*")
    with pytest.raises(RuntimeError, match="there is no Sparsifier; give the callback to the Trainer's callbacks"):
        callback.on_train_end(None, None, None)
    trainer(tmp_path, callback)
    assert callback.sparsifier.method.name == "gmp"
    assert len(callback.sparsifier.thresholds) == 4


@pytest.mark.parametrize("accumulated", [1, 2])
def test_accelerate(tmp_path, accumulated):
    def start():
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulated)
        model = small_net()
        sp, optimizer = Sparsifier(model, ramp(0.9, end=6)), torch.optim.AdamW(model.parameters(), lr=0.01)
        model, optimizer = accelerator.prepare(model, optimizer)
        accelerator.register_for_checkpointing(sp.follow(optimizer))
        return accelerator, model, optimizer, sp

    def train(steps, accelerator, model, optimizer, sp):
        for step in steps:
            images, labels = batch(step)
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.cross_entropy(model(images), labels))
                optimizer.step()
                optimizer.zero_grad()

    parts = start()
    train(range(4), *parts)
    parts[0].save_state(tmp_path / "state")
    train(range(4, 10), *parts)
    others = start()
    others[0].load_state(tmp_path / "state")
    train(range(4, 10), *others)
    assert parts[3].step_count == others[3].step_count == 10 // accumulated
    assert parts[3].thresholds == others[3].thresholds
    assert same(parts[1].state_dict(), others[1].state_dict())
    assert np.isclose(parts[3].sparsity, parts[3].target_sparsity, atol=3e-3)
