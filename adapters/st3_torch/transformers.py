"""Sparse training by the Trainer of Hugging Face Transformers."""

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:  # pragma: no cover
    raise ImportError(
        "st3_torch.transformers needs Transformers; install it with: pip install 'st3core[transformers]'"
    ) from error

from st3_torch.checkpoint import replacing
from st3_torch.layers import Rule
from st3_torch.metrics import metrics
from st3_torch.sparsifier import Sparsifier
from st3core import PolynomialSchedule
from st3core.method import Method

_ENTRY = "st3core"
"""Where the state is, among ``TrainerState.stateful_callbacks``.

The Trainer's own way, ``ExportableState``, restores nothing unless it is asked to, and then makes a new callback.
"""


class SparsifierCallback(TrainerCallback):
    """Trains the Trainer's model sparse: give it to the Trainer, and call ``sparsifier.finalize()`` at the end.

    The model is sparsified when the Trainer is made. The schedule counts completed optimizer updates: accumulated
    batches, and steps that a gradient scaler skips, do not count. The state is part of the Trainer's checkpoints, so
    ``train(resume_from_checkpoint=...)`` goes on where they were saved, and ``load_best_model_at_end`` brings back the
    thresholds that belong to the weights. Everything that the Trainer logs has ``sparsity``, ``target_sparsity`` and
    ``threshold`` too, or ``threshold/NAME`` of every kernel with methods that have several: in its ``log_history``, and
    in every callback that comes after this one.

    Args:
        schedule: sparsity as a function of the completed optimizer updates.
        method: as in :class:`st3_torch.Sparsifier`.
        include: as there.
        exclude: as there.
        min_density: as there.

    Attributes:
        sparsifier: of the Trainer's model; None before there is a Trainer.
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

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Sparsify the model: before its checkpoint is loaded, which ``train`` does first of all."""
        model = kwargs["model"]
        if self.sparsifier is None or self.sparsifier.model is not model:
            self.sparsifier = Sparsifier(model, self.schedule, self.method, **self._options)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Load the state of a checkpoint, if there is one, and follow the optimizer.

        Raises:
            ValueError: the Trainer has made a new model, a checkpoint has no state of the Sparsifier, or one of another
                method or schedule.
        """
        sparsifier = self._required()
        if kwargs["model"] is not sparsifier.model:
            raise ValueError(
                "SparsifierCallback: Trainer must train the model that it was made with; use no model_init"
            )
        saved = _saved(state)
        if _ENTRY in saved:
            sparsifier.load_state_dict(_from_json(saved[_ENTRY]))
        elif state.global_step:
            raise ValueError(
                "SparsifierCallback: a checkpoint must have the Sparsifier's state, got one of step "
                f"{state.global_step} without; resume from one that was saved with this callback"
            )
        sparsifier.follow(kwargs["optimizer"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the state where the Trainer will save it, if it is going to."""
        _saved(state).pop(_ENTRY, None)
        if control.should_save:
            self._put(state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the state to what was saved, if that was decided after :meth:`on_step_end`."""
        file = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}" / "trainer_state.json"
        if _ENTRY not in _saved(state) and state.is_world_process_zero and file.exists():
            self._put(state)
            with replacing(file) as partial:
                state.save_to_json(str(partial))

    def _put(self, state: TrainerState) -> None:
        _saved(state)[_ENTRY] = _to_json(self._required().state_dict())

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add sparsity and thresholds to what is logged."""
        found = metrics(self._required())
        kwargs["logs"].update(found)
        state.log_history[-1].update(found)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the optimizer go; if the Trainer has loaded the best model, load what belongs to it."""
        sparsifier = self._required()
        sparsifier.unfollow()
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            best = json.loads((Path(state.best_model_checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))
            sparsifier.load_state_dict(_from_json(best["stateful_callbacks"][_ENTRY]))

    def _required(self) -> Sparsifier:
        if self.sparsifier is None:
            raise RuntimeError(
                "SparsifierCallback: there is no Sparsifier; give the callback to the Trainer's callbacks"
            )
        return self.sparsifier


def _saved(state: TrainerState) -> dict[str, Any]:
    return cast(dict[str, Any], state.stateful_callbacks)  # a dictionary, whatever its annotation says


def _to_json(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state with its masks as text: one bit a weight, in base64."""
    masks = {
        name: base64.b64encode(np.packbits(mask.cpu().numpy()).tobytes()).decode()
        for name, mask in state["masks"].items()
    }
    return {**state, "masks": masks}


def _from_json(state: Mapping[str, Any]) -> dict[str, Any]:
    masks = {}
    for name, text in state["masks"].items():
        shape = state["shapes"][name]
        bits = np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8), count=int(np.prod(shape)))
        masks[name] = torch.from_numpy(bits).bool().reshape(shape)
    return {**state, "masks": masks}
