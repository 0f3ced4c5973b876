"""Backends with one defect each, and the property that each of them ought to violate."""

import dataclasses

import numpy as np

from st3core import get_method, reference
from st3core.conformance import NumpyBackend
from tests.conformance.textbook import Textbook

BROKEN: dict[type[NumpyBackend], str] = {}


def violates(name):
    def register(kind):
        kind.name = kind.__name__
        BROKEN[kind] = name
        return kind

    return register


# --- The search


@violates("thresholds_zero_the_rank")
class RankTooHigh(Textbook):
    """Wrong rank by one."""

    def position(self, count, sparsity):
        rank, fraction = reference.position(count, sparsity)
        return rank + 1, fraction


@violates("thresholds_zero_the_rank")
class RankTooLow(Textbook):
    """Wrong rank by one, the other way."""

    def position(self, count, sparsity):
        rank, fraction = reference.position(count, sparsity)
        return rank - 1, fraction


@violates("thresholds_zero_the_rank")
class RankOfAllWeights(Textbook):
    """``h = n s`` instead of ``(n - 1) s``."""

    def position(self, count, sparsity):
        return reference.position(count + 1, sparsity)


@violates("thresholds_count_many_weights")
class RankInFloat32(Textbook):
    """The rank in float32, which cannot count past 2^24."""

    def position(self, count, sparsity):
        h = np.float32(count - 1) * np.float32(sparsity)
        return int(h), float(h - np.floor(h))


@violates("thresholds_count_many_weights")
class CountsOverflow(Textbook):
    """Counts in 16 bits."""

    def position(self, count, sparsity):
        return reference.position((count & 0xFFFF) or 1, sparsity)


@violates("thresholds_interpolate")
class NoInterpolation(Textbook):
    """The lower of the two neighbouring magnitudes."""

    def between(self, e1, e2, fraction):
        return e1


@violates("thresholds_interpolate")
class Midpoint(Textbook):
    """Always half way between the neighbouring magnitudes."""

    def between(self, e1, e2, fraction):
        return (e1 + e2) / 2 if fraction else e1


@violates("thresholds_equal_the_reference")
class ThresholdInFloat32(Textbook):
    """Thresholds in float32."""

    def tensor_threshold(self, dtype, unit, e1, e2, value):
        return float(np.float32(super().tensor_threshold(dtype, unit, e1, e2, value)))


@violates("thresholds_separate_neighbours")
class ThresholdRoundedUp(Textbook):
    """Rounding to the dtype of the weights, up."""

    def tensor_threshold(self, dtype, unit, e1, e2, value):
        rounded = np.asarray(value * unit, np.float64).astype(dtype)[()]
        return float(rounded if rounded >= value * unit else np.nextafter(rounded, dtype.type(np.inf)))


@violates("thresholds_separate_neighbours")
class ThresholdNotHeldBack(Textbook):
    """``lambda sigma`` as it is, which may round to the next weight."""

    def tensor_threshold(self, dtype, unit, e1, e2, value):
        return value * unit


@violates("thresholds_are_global")
class PerTensor(Textbook):
    """A threshold for each tensor by itself."""

    def find_thresholds(self, weights, sparsity, method):
        self.check([np.asarray(w) for w in weights], sparsity)
        find = super().find_thresholds
        return np.array([find([w], sparsity, method)[0] if np.size(w) else 0.0 for w in weights])


@violates("thresholds_ignore_order")
class SortedThresholds(Textbook):
    """Thresholds in an order of their own."""

    def find_thresholds(self, weights, sparsity, method):
        return np.sort(super().find_thresholds(weights, sparsity, method))


@violates("thresholds_divide_by_sigma")
class SigmaMissing(Textbook):
    """No sigma."""

    def sigma(self, shape, score):
        return 1.0


@violates("thresholds_divide_by_sigma")
class SigmaOfProduct(Textbook):
    """The inverse root of the number of weights."""

    def sigma(self, shape, score):
        return 1.0 if score == "magnitude" else 1.0 / np.sqrt(max(np.prod(shape), 1))


@violates("thresholds_equal_the_reference")
class TimesInverseSigma(Textbook):
    """A product with the inverse of sigma, which has other bits than the quotient."""

    def magnitude(self, weight, unit):
        compute = reference.compute_dtype(weight.dtype).type
        return np.abs(weight).astype(compute) * (compute(1) / compute(unit))


@violates("thresholds_zero_ties_together")
class TiesLeft(Textbook):
    """A threshold just below weights that tie with the rank."""

    def tensor_threshold(self, dtype, unit, e1, e2, value):
        found = super().tensor_threshold(dtype, unit, e1, e2, value)
        return float(np.nextafter(dtype.type(found), dtype.type(0))) if e1 == e2 else found


@violates("thresholds_of_zero_sparsity")
class ZeroSparsityIsTheMinimum(Textbook):
    """The quantile of 0 instead of no threshold."""

    def without_sparsity(self, weights):
        return np.full(len(weights), min(float(np.abs(w).min()) for w in weights if w.size))


@violates("thresholds_keep_subnormals")
class SearchFlushesSubnormals(Textbook):
    """Subnormal magnitudes taken for zeros."""

    def magnitude(self, weight, unit):
        found = super().magnitude(weight, unit)
        return np.where(np.abs(weight) < reference_tiny(weight.dtype), found.dtype.type(0), found)


@violates("thresholds_reject_what_is_not_finite")
class SearchAcceptsNan(Textbook):
    """NaN and infinity replaced by numbers."""

    def check_weights(self, weights):
        if not sum(w.size for w in weights):
            raise ValueError("no weights")

    def magnitude(self, weight, unit):
        return np.nan_to_num(super().magnitude(weight, unit))


@violates("thresholds_reject_what_is_not_finite")
class MagnitudesOverflow(Textbook):
    """Finite weights whose magnitudes are infinite are accepted."""

    def check_magnitudes(self, parts):
        pass


@violates("thresholds_reject_bad_sparsity")
class SparsityClipped(Textbook):
    """A sparsity outside [0, 1) silently repaired."""

    def find_thresholds(self, weights, sparsity, method):
        repaired = 0.0 if np.isnan(sparsity) else min(max(sparsity, 0.0), 0.999999)
        return super().find_thresholds(weights, repaired if not 0 <= sparsity < 1 else sparsity, method)


@violates("thresholds_reject_no_weights")
class NothingAccepted(Textbook):
    """Zeros for no weights at all."""

    def find_thresholds(self, weights, sparsity, method):
        if not sum(np.size(w) for w in weights):
            return np.zeros(len(weights))
        return super().find_thresholds(weights, sparsity, method)


@violates("thresholds_depend_on_their_arguments_alone")
class RememberedThresholds(Textbook):
    """Thresholds kept by the memory that the weights are in."""

    def __init__(self):
        self.known = {}

    def find_thresholds(self, weights, sparsity, method):
        key = tuple(w.__array_interface__["data"][0] for w in weights if np.size(w))
        found = super().find_thresholds(weights, sparsity, method)
        return self.known.setdefault(key, found) if len(found) == len(self.known.get(key, found)) else found


# --- The forward weight


def reference_tiny(dtype):
    bits = np.dtype(f"u{dtype.itemsize}").type
    infinity = int(np.array(np.inf, dtype).view(bits))
    return np.array(infinity & -infinity, bits).view(dtype)[()]


@violates("forward_is_zero_up_to_the_threshold")
class GreaterOrEqual(Textbook):
    """``>=`` for ``>``: a weight equal to the threshold is kept."""

    def kept(self, weight, limit):
        return np.abs(weight) >= limit


@violates("forward_is_zero_up_to_the_threshold")
class TiesHalfKept(Textbook):
    """Of the weights that equal the threshold, every other one is kept by the hard threshold."""

    def kept(self, weight, limit):
        tied = np.abs(weight) == limit
        return (np.abs(weight) > limit) | (tied & (np.cumsum(tied).reshape(tied.shape) % 2 == 0))


@violates("forward_is_the_textbook_formula")
class ShrunkByQuotient(Textbook):
    """``w (1 - lambda / |w|)``, which loses digits and divides by zero."""

    def soft(self, values, limit, kept):
        return np.where(kept, values * (1 - limit / np.abs(values)), values.dtype.type(0))


@violates("forward_is_the_textbook_formula")
class NotShrunk(Textbook):
    """The hard threshold in place of the soft one."""

    def soft(self, values, limit, kept):
        return self.hard(values, limit, kept)


@violates("forward_keeps_weights_under_a_hard_threshold")
class HardShrinks(Textbook):
    """The soft threshold in place of the hard one."""

    def hard(self, values, limit, kept):
        return self.soft(values, limit, kept)


@violates("forward_scale_is_that_of_kept_magnitudes")
class WrongChannelAxis(Textbook):
    """The last axis, whichever was asked for."""

    def mean(self, magnitudes, channel_axis):
        return super().mean(magnitudes, -1)


@violates("forward_scale_is_that_of_kept_magnitudes")
class NegativeAxisTakenForTheFirst(Textbook):
    """Axis 0 for every negative axis."""

    def mean(self, magnitudes, channel_axis):
        return super().mean(magnitudes, max(channel_axis, 0))


@violates("forward_scales_each_channel")
class OneScaleForAll(Textbook):
    """One scale for the whole tensor."""

    def mean(self, magnitudes, channel_axis):
        return np.asarray(magnitudes.mean())


@violates("forward_scale_is_that_of_kept_magnitudes")
class ScaleFromShrunkWeights(Textbook):
    """The scale from magnitudes after they are shrunk."""

    def scale(self, values, kept, limit, channel_axis):
        magnitudes = np.abs(values).astype(np.float64)
        shrunk = np.maximum(magnitudes - limit.astype(np.float64), 0)
        return self.alpha(self.mean(magnitudes, channel_axis), self.mean(shrunk, channel_axis))


@violates("forward_scale_is_that_of_kept_magnitudes")
class ScaleOfKeptAlone(Textbook):
    """The mean of kept magnitudes over the kept weights instead of all of the channel."""

    def scale(self, values, kept, limit, channel_axis):
        magnitudes = np.abs(values).astype(np.float64)
        share = np.maximum(self.mean(kept.astype(np.float64), channel_axis), 1e-300)
        left = self.mean(np.where(kept, magnitudes, 0.0), channel_axis) / share
        return self.alpha(self.mean(magnitudes, channel_axis), left)


@violates("forward_scale_is_that_of_kept_magnitudes")
class NotRescaled(Textbook):
    """No scale at all."""

    def alpha(self, everything, kept):
        return np.ones_like(everything)


@violates("forward_equals_the_reference")
class NoEpsilon(Textbook):
    """A quotient of means without the small number in both."""

    def alpha(self, everything, kept):
        with np.errstate(all="ignore"):
            return 1.01 / (kept / everything + 0.01)


@violates("forward_equals_the_reference")
class SumsOverflow(Textbook):
    """Sums of the largest float64 weights that become infinite."""

    def mean(self, magnitudes, channel_axis):
        count = magnitudes.size // (magnitudes.shape[channel_axis] if magnitudes.ndim else 1)
        with np.errstate(over="ignore"):
            return super().mean(magnitudes * float(count), channel_axis) / count


@violates("forward_equals_the_reference")
class ScaleInHalfPrecision(Textbook):
    """Sums of magnitudes in bfloat16."""

    def mean(self, magnitudes, channel_axis):
        import ml_dtypes

        return super().mean(magnitudes, channel_axis).astype(ml_dtypes.bfloat16).astype(np.float64)


@violates("forward_without_threshold_is_the_identity")
class ZeroThresholdIsAThreshold(Textbook):
    """The formula also where there is no threshold, which turns -0 into +0."""

    def is_identity(self, limit):
        return False


@violates("forward_has_positive_zeros")
class SignOfZero(Textbook):
    """Zeros with the sign of the weight that they were."""

    def soft(self, values, limit, kept):
        return np.copysign(super().soft(values, limit, kept), values)


@violates("forward_keeps_subnormals")
class FlushedSubnormals(Textbook):
    """Subnormal forward weights taken for zeros."""

    def finished(self, result, weight):
        found = super().finished(result, weight)
        return np.where(np.abs(found) < reference_tiny(found.dtype), found.dtype.type(0), found)


@violates("forward_keeps_dtype_and_shape")
class DtypePromoted(Textbook):
    """Half precision comes back as float32."""

    def finished(self, result, weight):
        return result


@violates("forward_keeps_dtype_and_shape")
class ScalarsBecomeVectors(Textbook):
    """A weight without dimensions gets one."""

    def sparsify(self, weight, threshold, method, channel_axis):
        return np.atleast_1d(super().sparsify(weight, threshold, method, channel_axis))


@violates("forward_ignores_memory_layout")
class MemoryOrder(Textbook):
    """Wrong for weights that are not C-contiguous: elements in the order of memory."""

    def sparsify(self, weight, threshold, method, channel_axis):
        return super().sparsify(weight.ravel(order="K").reshape(weight.shape), threshold, method, channel_axis)


@violates("forward_depends_on_its_arguments_alone")
class StaleMask(Textbook):
    """The mask of the first call, kept by the memory that the weight is in."""

    def __init__(self):
        self.masks = {}

    def kept(self, weight, limit):
        key = weight.__array_interface__["data"][0], weight.shape
        return self.masks.setdefault(key, super().kept(weight, limit))


@violates("forward_rejects_what_is_not_finite")
class NanPassedThrough(Textbook):
    """NaN and infinity computed with."""

    def check_forward(self, weight):
        pass


@violates("arguments_are_not_written")
class InputMutated(Textbook):
    """The forward weight written over the raw weight."""

    def sparsify(self, weight, threshold, method, channel_axis):
        weight[...] = super().sparsify(weight, threshold, method, channel_axis)
        return weight


# --- The gradient


@violates("gradient_passes_straight_through")
class GradientMasked(Textbook):
    """No gradient where the weight is zero."""

    def straight_through(self, cotangent, weight, limit, channel_axis):
        return self.masked(cotangent, self.kept(weight, limit))


@violates("gradient_passes_straight_through")
class GradientScaled(Textbook):
    """A gradient through the product with alpha."""

    def straight_through(self, cotangent, weight, limit, channel_axis):
        if weight.size == 0 or limit == 0:
            return cotangent.copy()
        compute = reference.compute_dtype(weight.dtype)
        values, kept = weight.astype(compute), self.kept(weight, limit)
        scale = self.scale(values, kept, limit.astype(compute), channel_axis)
        return (scale * cotangent.astype(np.float64)).astype(cotangent.dtype)


@violates("gradient_is_masked")
class GradientNotMasked(Textbook):
    """A straight-through gradient where it should be masked."""

    def masked(self, cotangent, passes):
        return cotangent.copy()


@violates("gradient_is_masked")
class ZerosMaskedWithoutThreshold(Textbook):
    """Weights of zero are masked although there is no threshold yet."""

    def passes(self, weight, limits, limit):
        return self.kept(weight, limits)


@violates("gradient_passes_what_is_not_finite")
class MaskedByProduct(Textbook):
    """A product with 0, which is NaN for an infinite gradient."""

    def masked(self, cotangent, passes):
        with np.errstate(invalid="ignore"):
            return cotangent * passes.astype(cotangent.dtype)


@violates("gradient_passes_what_is_not_finite")
class GradientRepaired(Textbook):
    """NaN and infinity in a gradient replaced by numbers."""

    def straight_through(self, cotangent, weight, limit, channel_axis):
        return np.nan_to_num(cotangent)


@violates("gradient_keeps_dtype_and_shape")
class GradientInFloat64(Textbook):
    """Gradients come back in float64."""

    def vjp(self, weight, threshold, method, channel_axis, cotangent):
        return super().vjp(weight, threshold, method, channel_axis, cotangent).astype(np.float64)


@violates("gradient_is_masked")
class MaskOfTheForwardRule(Textbook):
    """Masked only where the method shrinks too."""

    def vjp(self, weight, threshold, method, channel_axis, cotangent):
        if get_method(method).operator == "hard":
            return np.asarray(cotangent).copy()
        return super().vjp(weight, threshold, method, channel_axis, cotangent)


@violates("gradient_is_scaled")
class ThetaOfTheKept(Textbook):
    """The gradient of what is kept scaled too."""

    def vjp(self, weight, threshold, method, channel_axis, cotangent):
        method = get_method(method)
        if method.backward == "scaled":
            return self.scaled(np.asarray(cotangent), cotangent.dtype.type(1 if method.theta is None else method.theta))
        return super().vjp(weight, threshold, method, channel_axis, cotangent)


@violates("gradient_is_scaled")
class ThetaMissing(Textbook):
    """A straight-through gradient where it should be scaled."""

    def scaled(self, cotangent, theta):
        return cotangent


@violates("gradient_decays")
class DecayOfTheGradient(Textbook):
    """Decay with the sign of an update, not of a gradient."""

    def decayed(self, cotangent, weight, decay):
        return cotangent - decay * weight


@violates("gradient_decays")
class DecayOfTheForwardWeight(Textbook):
    """Decay of what the layer uses, which is 0 there."""

    def decayed(self, cotangent, weight, decay):
        return cotangent


# --- Other scopes, operators and scales


@violates("thresholds_of_layers_are_their_own")
class LayersTogether(Textbook):
    """The scope of layers taken for the global one."""

    def find_thresholds(self, weights, sparsity, method):
        method = get_method(method)
        plain = method if method.scope == "n:m" else dataclasses.replace(method, scope="global")
        return super().find_thresholds(weights, sparsity, plain)


@violates("thresholds_of_groups_are_their_largest")
class SmallestGroupThreshold(Textbook):
    """The smallest threshold of a tensor's groups."""

    def largest(self, weight, group, axis):
        return float(self.group_limits(weight, group, axis).astype(np.float64).min()) if weight.size else 0.0


@violates("forward_keeps_the_largest_of_each_group")
class GroupsAlongTheOutput(Textbook):
    """Groups along the output channels."""

    def limits(self, weight, limit, method, channel_axis):
        if method.scope != "n:m":
            return limit
        return self.group_limits(weight, method.group, channel_axis % max(weight.ndim, 1))


@violates("forward_keeps_the_largest_of_each_group")
class AlwaysTwoOfFour(Textbook):
    """Groups of 2:4, whatever was asked for."""

    def group_limits(self, weight, group, axis):
        return super().group_limits(weight, (2, 4), axis)


@violates("forward_keeps_the_largest_of_each_group")
class ShortGroupKept(Textbook):
    """A last group that is shorter stays as it is."""

    def group_limits(self, weight, group, axis):
        found = super().group_limits(weight, group, axis).copy()
        if found.ndim:
            rest = [slice(None)] * found.ndim
            rest[axis] = slice(found.shape[axis] // group[1] * group[1], None)
            found[tuple(rest)] = 0
        return found


@violates("forward_is_the_power_formula")
class AlwaysCubic(Textbook):
    """The exponent 3, whatever was asked for."""

    def power(self, exponent):
        return super().power(3.0)


@violates("forward_is_the_power_formula")
class PowerByItsFormula(Textbook):
    """The quotient's power subtracted from 1, which leaves nothing but rounding next to the threshold."""

    def power(self, exponent):
        def operator(values, limit, kept):
            with np.errstate(all="ignore"):
                magnitudes = np.abs(values)
                share = (1 - (limit / magnitudes) ** values.dtype.type(exponent)) ** values.dtype.type(1 / exponent)
                found = np.copysign(np.maximum(magnitudes * share, magnitudes - limit), values)
            return np.where(kept, found, values.dtype.type(0))

        return operator


@violates("forward_is_nearest_to_the_weight")
class RatioOfNorms(Textbook):
    """A factor that restores the norm of the weight."""

    def least_squares(self, weight, thresholded):
        squares = (thresholded * thresholded).sum()
        return np.sqrt((weight * weight).sum() / squares) if squares else 1.0


@violates("forward_is_nearest_to_the_weight")
class FactorMissing(Textbook):
    """No factor at all."""

    def least_squares(self, weight, thresholded):
        return 1.0


# --- What shows only in certain calls


@violates("forward_depends_on_its_arguments_alone")
class MaskOfTheThreshold(Textbook):
    """A mask kept for as long as the threshold stays, while the weights move on."""

    def __init__(self):
        self.masks = {}

    def kept(self, weight, limit):
        key = weight.__array_interface__["data"][0], weight.shape, np.asarray(limit).tobytes()
        return self.masks.setdefault(key, super().kept(weight, limit))


@violates("forward_depends_on_its_arguments_alone")
class OutputReused(Textbook):
    """Every answer in the memory of the answer before."""

    def __init__(self):
        self.outputs = {}

    def sparsify(self, weight, threshold, method, channel_axis):
        found = super().sparsify(weight, threshold, method, channel_axis)
        output = self.outputs.setdefault((found.shape, found.dtype), found)
        output[...] = found
        return output


@violates("gradient_depends_on_its_arguments_alone")
class StaleGradientMask(Textbook):
    """The gradient's mask of the first call, kept by the memory that the weight is in."""

    def __init__(self):
        self.masks = {}

    def passes(self, weight, limits, limit):
        key = weight.__array_interface__["data"][0], weight.shape
        return self.masks.setdefault(key, super().passes(weight, limits, limit))


@violates("forward_scale_is_that_of_kept_magnitudes")
class SumInFloat32(Textbook):
    """Channel sums in float32, one after the other."""

    def mean(self, magnitudes, channel_axis):
        if magnitudes.ndim != 2:
            return super().mean(magnitudes, channel_axis)
        axis = 1 - channel_axis % 2
        total = np.cumsum(magnitudes.astype(np.float32), axis=axis, dtype=np.float32).take([-1], axis=axis)
        return total.astype(np.float64) / magnitudes.shape[axis]


@violates("forward_is_zero_up_to_the_threshold")
class LargeTensorTail(Textbook):
    """What does not fill a block of 1024 is left as it is."""

    def sparsify(self, weight, threshold, method, channel_axis):
        found = super().sparsify(weight, threshold, method, channel_axis)
        whole = weight.size // 1024 * 1024
        if whole:
            found.reshape(-1)[whole:] = np.ascontiguousarray(weight).reshape(-1)[whole:]
        return found


@violates("gradient_is_masked")
class LargeGradientTail(Textbook):
    """The gradient of what does not fill a block of 1024 is not masked."""

    def masked(self, cotangent, passes):
        found = super().masked(cotangent, passes)
        whole = cotangent.size // 1024 * 1024
        if whole:
            found.reshape(-1)[whole:] = np.ascontiguousarray(cotangent).reshape(-1)[whole:]
        return found


@violates("forward_is_zero_up_to_the_threshold")
class ThresholdRoundedTwice(Textbook):
    """A threshold rounded to float32 on its way to float16."""

    def sparsify(self, weight, threshold, method, channel_axis):
        return super().sparsify(weight, float(np.float32(threshold)), method, channel_axis)


@violates("forward_without_threshold_is_the_identity")
class ThresholdNotRoundedFirst(Textbook):
    """A threshold that rounds to 0 taken for one."""

    def sparsify(self, weight, threshold, method, channel_axis):
        self.threshold = threshold
        return super().sparsify(weight, threshold, method, channel_axis)

    def is_identity(self, limit):
        return self.threshold == 0


@violates("gradient_is_masked")
class GradientMaskNotRounded(Textbook):
    """A mask by the threshold in float64, instead of the one that the forward weight has."""

    def vjp(self, weight, threshold, method, channel_axis, cotangent):
        if get_method(method).backward == "masked" and threshold > 0:
            return self.masked(cotangent, np.abs(weight.astype(np.float64)) > threshold)
        return super().vjp(weight, threshold, method, channel_axis, cotangent)


@violates("thresholds_are_global")
class FirstTensorsOnly(Textbook):
    """Tensors after the sixteenth do not count."""

    def find_thresholds(self, weights, sparsity, method):
        found = super().find_thresholds(weights[:16], sparsity, method)
        return np.concatenate([found, np.repeat(found[:1], max(len(weights) - 16, 0))])


@violates("thresholds_divide_by_sigma")
class SigmaOfSmallShapes(Textbook):
    """A sigma that stays the same from a sum of a hundred on."""

    def sigma(self, shape, score):
        return super().sigma(shape if sum(shape) < 100 else (100,), score)


@violates("forward_keeps_dtype_and_shape")
class FourDimensions(Textbook):
    """No more than four dimensions."""

    def sparsify(self, weight, threshold, method, channel_axis):
        if weight.ndim > 4:
            raise ValueError("too many dimensions")
        return super().sparsify(weight, threshold, method, channel_axis)
