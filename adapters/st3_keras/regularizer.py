"""Penalties on the raw weights, while the model's variables hold the forward weights."""

from typing import Any

import keras

from st3_keras.backend import BACKEND


def penalty_gradient(penalty: Any, raw: Any) -> Any:
    """Gradient of ``penalty(raw)`` for a tensor."""
    if BACKEND == "jax":
        import jax

        return jax.grad(lambda w: keras.ops.sum(penalty(w)))(raw)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        raw = tf.convert_to_tensor(raw)
        with tf.GradientTape() as tape:
            tape.watch(raw)
            value = penalty(raw)
        return tape.gradient(value, raw, unconnected_gradients="zero") / _replicas(tf)
    import torch

    with torch.enable_grad():
        leaf = raw.detach().requires_grad_()
        value = penalty(leaf)
        (gradient,) = torch.autograd.grad(value, leaf, allow_unused=True)
    return torch.zeros_like(raw) if gradient is None else gradient


def _replicas(tf: Any) -> int:
    return int(tf.distribute.get_strategy().num_replicas_in_sync)


@keras.saving.register_keras_serializable("st3_keras")
class RawPenalty(keras.regularizers.Regularizer):
    """Stands on a model's variable in place of its regularizer: the penalty of the raw weight, without a gradient.

    The gradient is added by the optimizer, where the raw weight is known on every backend. This is the value alone,
    for the logged loss.

    Args:
        inner: the regularizer of the layer.
        read: gives the raw weight, or None where it cannot be read.
        in_use: whether the raw weight is the one that trains; if it is not, the penalty is an ordinary one.
    """

    def __init__(self, inner: Any, read: Any = None, in_use: Any = None) -> None:
        self.inner, self._read, self._in_use = inner, read, in_use

    def __call__(self, x: Any) -> Any:
        """Penalty of the raw weight; of ``x``, the forward weight, where the raw one cannot be read."""
        if self._in_use is not None and not self._in_use():
            return self.inner(x)
        raw = None if self._read is None else self._read()
        return keras.ops.stop_gradient(self.inner(keras.ops.stop_gradient(x if raw is None else raw)))

    def get_config(self) -> dict[str, Any]:
        """What the constructor takes."""
        return {"inner": keras.saving.serialize_keras_object(self.inner)}
