"""A correct backend in plain NumPy, in steps that a broken one can replace one by one."""

import dataclasses

import numpy as np

from st3core import get_method, reference
from st3core.conformance import NumpyBackend


class Textbook(NumpyBackend):
    name = "textbook"

    # Equations 1 and 2

    def find_thresholds(self, weights, sparsity, method):
        weights = [np.asarray(w) for w in weights]
        self.check(weights, sparsity)
        method, score = get_method(method), get_method(method).score
        if sparsity == 0:
            return self.without_sparsity(weights)
        if method.scope == "layer":
            return np.array([self.one_layer(w, sparsity, method) for w in weights])
        if method.scope == "n:m":
            axes = [self.input_axis(w, 0) for w in weights]
            return np.array([self.largest(w, method.group, axis) for w, axis in zip(weights, axes, strict=True)])
        units = [self.sigma(w.shape, score) for w in weights]
        parts = [self.magnitude(w, u).astype(np.float64).ravel() for w, u in zip(weights, units, strict=True)]
        self.check_magnitudes(parts)
        e1, e2, value = self.quantile(np.sort(np.concatenate(parts)), sparsity)
        pairs = zip(weights, units, strict=True)
        return np.array([self.tensor_threshold(w.dtype, u, e1, e2, value) for w, u in pairs])

    def one_layer(self, weight, sparsity, method):
        plain = dataclasses.replace(method, scope="global")
        return Textbook.find_thresholds(self, [weight], sparsity, plain)[0] if weight.size else 0.0

    def largest(self, weight, group, axis):
        return float(self.group_limits(weight, group, axis).astype(np.float64).max(initial=0))

    def check(self, weights, sparsity):
        if not 0 <= sparsity < 1:
            raise ValueError("sparsity")
        self.check_weights(weights)

    def check_weights(self, weights):
        if not sum(w.size for w in weights):
            raise ValueError("no weights")
        if not all(np.isfinite(w).all() for w in weights):
            raise ValueError("not finite")

    def check_magnitudes(self, parts):
        if not all(np.isfinite(part).all() for part in parts):
            raise ValueError("a magnitude overflows")

    def without_sparsity(self, weights):
        return np.zeros(len(weights))

    def sigma(self, shape, score):
        return reference.sigma(shape, score)

    def magnitude(self, weight, unit):
        return reference.magnitude(weight, unit)

    def position(self, count, sparsity):
        return reference.position(count, sparsity)

    def quantile(self, ordered, sparsity):
        rank, fraction = self.position(ordered.size, sparsity)
        rank = min(max(rank, 0), ordered.size - 1)
        e1 = float(ordered[rank])
        e2 = float(ordered[rank + 1]) if rank + 1 < ordered.size else np.inf
        return e1, e2, self.between(e1, e2, fraction)

    def between(self, e1, e2, fraction):
        return e1 + fraction * (e2 - e1) if fraction and np.isfinite(e2) else e1

    def tensor_threshold(self, dtype, unit, e1, e2, value):
        return reference.tensor_threshold(dtype, unit, e1, e2, value)

    # Equations 3 to 5

    def sparsify(self, weight, threshold, method, channel_axis):
        weight, method = np.asarray(weight), get_method(method)
        self.check_forward(weight)
        limit = np.float64(threshold).astype(weight.dtype)
        if weight.size == 0 or self.is_identity(limit):
            return weight.copy()
        compute = reference.compute_dtype(weight.dtype)
        limit = self.limits(weight, limit, method, channel_axis)
        values, bound = weight.astype(compute), limit.astype(compute)
        kept = self.kept(weight, limit)
        operator = {"hard": self.hard, "soft": self.soft, "power": self.power(method.power)}[method.operator]
        result = operator(values, bound, kept)
        if method.rescale == "channel":
            result = self.scale(values, kept, bound, channel_axis).astype(compute) * result
        if method.rescale == "least_squares":
            result = compute.type(self.least_squares(values.astype(np.float64), result.astype(np.float64))) * result
        return self.finished(result, weight)

    def limits(self, weight, limit, method, channel_axis):
        if method.scope != "n:m":
            return limit
        return self.group_limits(weight, method.group, self.input_axis(weight, channel_axis))

    def input_axis(self, weight, channel_axis):
        if weight.ndim < 2:
            return 0
        axis = channel_axis % weight.ndim
        return axis - 1 if axis else 1

    def group_limits(self, weight, group, axis):
        return np.asarray(reference.group_thresholds(weight, group, axis))

    def power(self, exponent):
        def operator(values, limit, kept):
            return np.where(kept, reference.power_threshold(values, np.broadcast_to(limit, values.shape), exponent), 0)

        return operator

    def least_squares(self, weight, thresholded):
        largest = np.abs(weight).max(initial=1e-300)
        raw, left = weight / largest, thresholded / largest
        return (raw * left).sum() / (left * left).sum() if left.any() else 1.0

    def check_forward(self, weight):
        if not np.isfinite(weight).all():
            raise ValueError("not finite")

    def is_identity(self, limit):
        return limit == 0

    def kept(self, weight, limit):
        return np.abs(weight) > limit

    def soft(self, values, limit, kept):
        return np.where(kept, values - np.clip(values, -limit, limit), values.dtype.type(0))

    def hard(self, values, limit, kept):
        return np.where(kept, values, values.dtype.type(0))

    def scale(self, values, kept, limit, channel_axis):
        magnitudes = np.abs(values).astype(np.float64)
        return self.alpha(*(self.mean(m, channel_axis) for m in (magnitudes, np.where(kept, magnitudes, 0.0))))

    def alpha(self, everything, kept):
        return 1.01 / ((kept + 1e-6) / (everything + 1e-6) + 0.01)

    def mean(self, magnitudes, channel_axis):
        own = {channel_axis % magnitudes.ndim} if magnitudes.ndim else set()
        others = tuple(set(range(magnitudes.ndim)) - own)
        # An exact power of two, or the largest float64 weights would overflow the sum.
        return (magnitudes * 2.0**-64).mean(axis=others, keepdims=True) * 2.0**64 if others else magnitudes

    def finished(self, result, weight):
        return result.astype(weight.dtype)

    # Equation 6

    def vjp(self, weight, threshold, method, channel_axis, cotangent):
        weight, cotangent, method = np.asarray(weight), np.asarray(cotangent), get_method(method)
        limit = np.float64(threshold).astype(weight.dtype)
        if method.backward == "straight_through":
            return self.straight_through(cotangent, weight, limit, channel_axis)
        limits = self.limits(weight, limit, method, channel_axis) if limit > 0 else limit
        passes = self.passes(weight, limits, limit)
        if method.backward == "masked":
            return self.masked(cotangent, passes)
        compute = reference.compute_dtype(weight.dtype)
        wide, raw = cotangent.astype(compute), weight.astype(compute)
        if method.backward == "scaled":
            other = self.scaled(wide, compute.type(1 if method.theta is None else method.theta))
        else:
            other = self.decayed(wide, raw, compute.type(method.decay))
        return np.where(passes, cotangent, other.astype(cotangent.dtype))

    def scaled(self, cotangent, theta):
        return theta * cotangent

    def decayed(self, cotangent, weight, decay):
        return cotangent + decay * weight

    def passes(self, weight, limits, limit):
        return self.kept(weight, limits) | (limit == 0)

    def masked(self, cotangent, passes):
        return np.where(passes, cotangent, cotangent.dtype.type(0))

    def straight_through(self, cotangent, weight, limit, channel_axis):
        return cotangent.copy()
