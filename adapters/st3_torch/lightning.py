"""Sparse training by a Lightning Trainer."""

from collections.abc import Mapping, Sequence
from typing import Any

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:  # pragma: no cover
    raise ImportError(
        "st3_torch.lightning needs Lightning; install it with: pip install 'st3core[lightning]'"
    ) from error

from st3_torch.layers import Rule
from st3_torch.metrics import metrics
from st3_torch.sparsifier import Sparsifier
from st3_torch.updates import trains_any
from st3core import PolynomialSchedule
from st3core.method import Method


class SparsifierCallback(Callback):
    """Trains a ``LightningModule`` sparse: give it to the Trainer, and call ``sparsifier.finalize()`` at the end.

    The schedule counts completed optimizer updates: accumulated batches, and steps that a gradient scaler skips, do not
    count. The state is part of Lightning's checkpoints, so ``fit(..., ckpt_path=...)`` goes on where they were saved.
    Every ``log_every_n_steps`` updates the Trainer's loggers get ``sparsity``, ``target_sparsity`` and ``threshold``,
    or ``threshold/NAME`` of every kernel with methods that have several.

    Args:
        schedule: sparsity as a function of the completed optimizer updates.
        method: as in :class:`st3_torch.Sparsifier`.
        include: as there.
        exclude: as there.
        min_density: as there.

    Attributes:
        sparsifier: of the module that was trained last; None before the first ``fit``. The module is sparsified in
            ``setup``, so layers that are made later, in its ``configure_model``, stay dense.
    """

    def __init__(
        self,
        schedule: PolynomialSchedule,
        method: str | Method = "st3",
        *,
        include: Rule | Sequence[Rule] | None = None,
        exclude: Rule | Sequence[Rule] | None = None,
        min_density: float | Mapping[str, float] = 0.0,
    ) -> None:
        self.schedule, self.method = schedule, method
        self._options: dict[str, Any] = {"include": include, "exclude": exclude, "min_density": min_density}
        self.sparsifier: Sparsifier | None = None
        self._logged_step = 0
        self._is_loaded = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Sparsify the module, before its checkpoint is loaded."""
        self._is_loaded = False
        if self.sparsifier is None or self.sparsifier.model is not pl_module:
            self.sparsifier = Sparsifier(pl_module, self.schedule, self.method, **self._options)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Follow the optimizer, which exists now.

        Raises:
            ValueError: not exactly one of the module's optimizers trains sparsified kernels, or the checkpoint has no
                state of this callback.
        """
        self._check_checkpoint(trainer)
        sparsifier = self._required()
        raw = sparsifier.raw_parameters
        optimizers = [optimizer for optimizer in trainer.optimizers if trains_any(optimizer, raw)]
        if len(optimizers) != 1:
            raise ValueError(
                f"SparsifierCallback: exactly one optimizer must train sparsified kernels, got {len(optimizers)}; "
                "choose the kernels of one by include or exclude"
            )
        sparsifier.follow(optimizers[0])

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a checkpoint without thresholds, as all of these do."""
        self._check_checkpoint(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See :meth:`on_validation_start`."""
        self._check_checkpoint(trainer)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See :meth:`on_validation_start`."""
        self._check_checkpoint(trainer)

    def _check_checkpoint(self, trainer: Trainer) -> None:
        path = trainer.ckpt_path
        if path is not None and not self._is_loaded:
            raise ValueError(
                f"SparsifierCallback: ckpt_path must have the Sparsifier's state, got {path}, which has none and would "
                "run dense; save checkpoints with save_weights_only=False"
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log, if an update was made and it is time."""
        step, interval = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined] # set elsewhere
        if step == self._logged_step or step % interval:
            return
        self._logged_step = step
        found = metrics(self._required()) if trainer.loggers else {}
        for logger in trainer.loggers:
            logger.log_metrics(found, step=step)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the optimizer go."""
        self._required().unfollow()

    def state_dict(self) -> dict[str, Any]:
        """State of the Sparsifier, for Lightning's checkpoint."""
        return {} if self.sparsifier is None else self.sparsifier.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` has saved; Lightning has loaded the module already."""
        self._required().load_state_dict(state_dict)
        self._is_loaded = True

    def _required(self) -> Sparsifier:
        if self.sparsifier is None:
            raise RuntimeError("SparsifierCallback: there is no Sparsifier before Trainer.fit has begun")
        return self.sparsifier
