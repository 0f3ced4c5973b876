"""Numba kernels: loops over memory, and nothing else.

Private. A kernel validates nothing and decides nothing; the drivers in :mod:`st3core.counting` and
:mod:`st3core.operators` do. Every kernel has a plain NumPy twin in :mod:`st3core.reference` and also
runs as ordinary Python under ``NUMBA_DISABLE_JIT=1``.

Weights arrive as *tables of addresses*, so that one call serves any number of tensors of one memory
format. All the kernels live in this one file because Numba's on-disk cache is keyed by the file of the
outer function: a change of an inlined helper elsewhere would go unnoticed.

Loops run over slices from zero (``block = source[start:stop]; for i in range(block.size)``): for an
index that is not provably non-negative Numba emits a wrap-around test, and LLVM then gives up on SIMD.
"""

import ctypes
from typing import Any

import numpy as np
from numba import carray, config, njit, types
from numba.extending import intrinsic

from st3core.reference import RESCALE_EPSILON, RESCALE_NUMERATOR, RESCALE_OFFSET

FLOAT16, BFLOAT16, FLOAT32, FLOAT64 = range(4)
"""Memory formats; the kernels read them as uint16, uint16, uint32 and uint64."""

BLOCK = 1024
"""Elements that are converted and examined at a time: 4 or 8 KiB of first-level cache."""

LANES = 64
"""Partial sums of a channel. Fixed, so that sums do not depend on the machine's SIMD width."""

_STRIDE = 256
_jit = njit(nogil=True, cache=True, error_model="numpy")
_inline = njit(nogil=True, cache=True, error_model="numpy", forceinline=True)


# --- Memory -----------------------------------------------------------------------------------------

if config.DISABLE_JIT:

    def array_at(address: int, size: int, like: np.ndarray) -> np.ndarray:
        """One-dimensional view of ``size`` elements of ``like``'s dtype at ``address``."""
        if size == 0:
            return np.empty(0, like.dtype)
        buffer: Any = (ctypes.c_char * (int(size) * like.dtype.itemsize)).from_address(int(address))
        return np.ndarray((int(size),), like.dtype, buffer)

else:

    @intrinsic
    def _pointer(typing_context: Any, address: types.Type) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.voidptr(types.int64), generate

    @_jit
    def array_at(address, size, like):  # type: ignore[no-untyped-def]
        """One-dimensional view of ``size`` elements of ``like``'s dtype at ``address``."""
        return carray(_pointer(address), (size,), like.dtype)


# --- Half precision: exact widening, rounding to nearest even, no subnormal float32 on the way ------


@_inline
def _widen_float16(source, values):  # type: ignore[no-untyped-def]
    bits = values.view(np.uint32)
    for i in range(source.size):
        magnitude = np.uint32(source[i] & 0x7FFF)
        exponent_shift = np.uint32(112 << 23)  # 127 - 15: the difference of the exponents' biases
        if magnitude < 0x400:
            exponent_shift = np.uint32(113 << 23)
        if magnitude >= 0x7C00:
            exponent_shift = np.uint32(224 << 23)
        bits[i] = np.uint32((magnitude << np.uint32(13)) + exponent_shift)
    for i in range(source.size):
        if (source[i] & 0x7FFF) < 0x400:
            values[i] -= np.float32(2.0**-14)
    for i in range(source.size):
        bits[i] |= np.uint32(source[i] & 0x8000) << np.uint32(16)


@_inline
def _narrow_float16(values, scratch, target):  # type: ignore[no-untyped-def]
    bits, scratch_bits = values.view(np.uint32), scratch.view(np.uint32)
    for i in range(target.size):  # the addition rounds what will be a subnormal float16
        scratch[i] = abs(values[i]) + np.float32(0.5)
    for i in range(target.size):
        magnitude = bits[i] & np.uint32(0x7FFFFFFF)
        if magnitude >= np.uint32(0x47800000):
            half = np.uint32(0x7C00)
        elif magnitude < np.uint32(0x38800000):
            half = np.uint32(scratch_bits[i] - np.uint32(0x3F000000))
        else:
            odd = (magnitude >> np.uint32(13)) & np.uint32(1)
            rounded = magnitude - np.uint32(0x38000000) + np.uint32(0xFFF) + odd
            half = np.uint32(rounded >> np.uint32(13))
        sign = (bits[i] >> np.uint32(16)) & np.uint32(0x8000)
        target[i] = np.uint16(half | sign)


@_inline
def _widen_bfloat16(source, values):  # type: ignore[no-untyped-def]
    bits = values.view(np.uint32)
    for i in range(source.size):
        bits[i] = np.uint32(source[i]) << np.uint32(16)


@_inline
def _narrow_bfloat16(values, target):  # type: ignore[no-untyped-def]
    bits = values.view(np.uint32)
    for i in range(target.size):
        odd = (bits[i] >> np.uint32(16)) & np.uint32(1)
        # In 64 bits, or the largest NaN patterns would wrap around to zero.
        rounded = np.uint64(bits[i]) + np.uint64(0x7FFF) + np.uint64(odd)
        target[i] = np.uint16(rounded >> np.uint64(16))


# --- Magnitudes as keys: the bits of a non-negative float order like the float ---------------------


@_inline
def _load_float32_magnitudes(source, memory_format, scale, magnitudes):  # type: ignore[no-untyped-def]
    if memory_format == FLOAT32:
        bits = magnitudes.view(np.uint32)
        for i in range(source.size):
            bits[i] = np.uint32(source[i]) & np.uint32(0x7FFFFFFF)
    else:
        if memory_format == FLOAT16:
            _widen_float16(source, magnitudes)
        else:
            _widen_bfloat16(source, magnitudes)
        for i in range(source.size):
            magnitudes[i] = abs(magnitudes[i])
    if scale != 1.0:
        divisor = np.float32(scale)
        for i in range(source.size):
            magnitudes[i] = magnitudes[i] / divisor


@_inline
def _load_float64_magnitudes(source, memory_format, scale, narrow, magnitudes):  # type: ignore[no-untyped-def]
    if memory_format == FLOAT64:
        bits = magnitudes.view(np.uint64)
        for i in range(source.size):
            bits[i] = np.uint64(source[i]) & np.uint64(0x7FFFFFFFFFFFFFFF)
        if scale != 1.0:
            for i in range(source.size):
                magnitudes[i] = magnitudes[i] / scale
    else:  # formed in the weight's own precision, then widened
        _load_float32_magnitudes(source, memory_format, scale, narrow)
        for i in range(source.size):
            magnitudes[i] = narrow[i]


@_inline
def _load_keys(source, memory_format, scale, narrow, magnitudes):  # type: ignore[no-untyped-def]
    if magnitudes.itemsize == 4:
        _load_float32_magnitudes(source, memory_format, scale, magnitudes.view(np.float32))
    else:
        wide = magnitudes.view(np.float64)
        _load_float64_magnitudes(source, memory_format, scale, narrow, wide)


@_inline
def _count_block(keys, low, high):  # type: ignore[no-untyped-def]
    below, inside, largest = np.uint32(0), np.uint32(0), keys[0]
    for i in range(keys.size):
        key = keys[i]
        below = np.uint32(below + np.uint32(key < low))
        inside = np.uint32(inside + np.uint32((key >= low) & (key < high)))
        largest = max(largest, key)
    return below, inside, largest


@_inline
def _gather_block(keys, size, low, high, hits, buffer, taken):  # type: ignore[no-untyped-def]
    """Append the first ``size`` of ``keys`` that are in the interval; ``buffer`` has one place to spare."""
    hits[:] = 0
    for start in range(0, size, _STRIDE):  # SIMD over columns: which ones need a closer look
        row = keys[start : start + _STRIDE]
        for i in range(row.size):
            hits[i] += np.uint32((row[i] >= low) & (row[i] < high))
    for column in range(_STRIDE):
        if hits[column]:
            for i in range(column, size, _STRIDE):
                buffer[taken] = keys[i]
                taken += np.intp((keys[i] >= low) & (keys[i] < high))
    return taken


@_jit
def count(chunks, scales, memory_format, source_like, interval, buffer, bins):  # type: ignore[no-untyped-def]
    """Count the keys below and inside an interval, and keep those inside in one of two ways.

    Args:
        chunks: int64 ``(m, 3)``: address, number of elements, index into ``scales``.
        scales: float64: what each tensor's magnitudes are divided by.
        memory_format: FLOAT16, BFLOAT16, FLOAT32 or FLOAT64.
        source_like: empty array of the unsigned type that holds one element.
        interval: ``(low, high, shift)`` in the unsigned type of the keys; inside is ``low <= key < high``.
        buffer: takes the keys inside, as long as a whole block of them would fit.
        bins: int64; if not empty, ``bins[(key - low) >> shift]`` is raised for each key inside instead.

    Returns:
        Number of keys below ``low``, number inside, the largest of all keys, and how many are in the
        buffer: all of those inside, unless it was too small.
    """
    low, high, shift = interval[0], interval[1], interval[2]
    keys, hits = np.empty(BLOCK, interval.dtype), np.empty(_STRIDE, np.uint32)
    narrow, found = np.empty(BLOCK, np.float32), np.empty(BLOCK + 1, interval.dtype)
    below, inside, taken, largest = 0, 0, 0, interval.dtype.type(0)
    for c in range(chunks.shape[0]):
        source = array_at(chunks[c, 0], chunks[c, 1], source_like)
        scale = scales[chunks[c, 2]]
        for start in range(0, source.size, BLOCK):
            block = source[start : start + BLOCK]
            _load_keys(block, memory_format, scale, narrow, keys)
            block_below, block_inside, block_largest = _count_block(keys[: block.size], low, high)
            if block_inside > 0 and bins.size > 0:
                _gather_block(keys, block.size, low, high, hits, found, 0)
                for i in range(block_inside):
                    bins[np.intp((found[i] - low) >> shift)] += 1
            elif block_inside > 0 and taken == inside and taken + block_inside < buffer.size:
                taken = _gather_block(keys, block.size, low, high, hits, buffer, taken)
            below += block_below
            inside += block_inside
            largest = max(largest, block_largest)
    return below, inside, largest, taken


@_jit
def successor(chunks, scales, memory_format, source_like, key):  # type: ignore[no-untyped-def]
    """Smallest key above ``key[0]``; ``key[1]`` where there is none. Arguments as in :func:`count`."""
    floor, best = key[0], key[1]
    keys = np.empty(BLOCK, key.dtype)
    narrow = np.empty(BLOCK, np.float32)
    for c in range(chunks.shape[0]):
        source = array_at(chunks[c, 0], chunks[c, 1], source_like)
        scale = scales[chunks[c, 2]]
        for start in range(0, source.size, BLOCK):
            block = source[start : start + BLOCK]
            _load_keys(block, memory_format, scale, narrow, keys)
            best = _successor_in_block(keys[: block.size], floor, best)
    return best


@_inline
def _successor_in_block(keys, floor, best):  # type: ignore[no-untyped-def]
    nothing = best
    for i in range(keys.size):
        best = min(best, keys[i] if keys[i] > floor else nothing)
    return best


@_jit
def sample(chunks, scales, memory_format, source_like, stride, keys):  # type: ignore[no-untyped-def]
    """Write the key of every ``stride``-th element, starting in the middle; return how many."""
    elements = np.empty(BLOCK, source_like.dtype)
    narrow = np.empty(BLOCK, np.float32)
    taken, position = 0, stride // 2
    for c in range(chunks.shape[0]):
        source = array_at(chunks[c, 0], chunks[c, 1], source_like)
        scale = scales[chunks[c, 2]]
        while position < source.size and taken < keys.size:
            count = 0
            while position < source.size and count < BLOCK and taken + count < keys.size:
                elements[count] = source[position]
                position += stride
                count += 1
            _load_keys(elements[:count], memory_format, scale, narrow, keys[taken : taken + count])
            taken += count
        position -= source.size
    return taken


# --- The operator ---------------------------------------------------------------------------------


@_inline
def _load_values(source, memory_format, buffer):  # type: ignore[no-untyped-def]
    if memory_format == FLOAT16:
        _widen_float16(source, buffer)
        return buffer[: source.size]
    if memory_format == BFLOAT16:
        _widen_bfloat16(source, buffer)
        return buffer[: source.size]
    return source.view(buffer.dtype)


@_inline
def _store_values(values, memory_format, scratch, target):  # type: ignore[no-untyped-def]
    if memory_format == FLOAT16:
        _narrow_float16(values, scratch, target)
    else:
        _narrow_bfloat16(values, target)


@_inline
def _add(sums, errors, i, value):  # type: ignore[no-untyped-def]
    """Add to ``sums[i]``, and the rounding error to ``errors[i]`` (Knuth's two-sum)."""
    total = sums[i] + value
    added = total - sums[i]
    errors[i] += (sums[i] - (total - added)) + (value - added)
    sums[i] = total


@_inline
def _accumulate(values, threshold, lanes, period):  # type: ignore[no-untyped-def]
    """Add magnitude ``i``, and again if it is kept, to lane ``i % period`` of the sums."""
    # Sums of float32 magnitudes in float64 have bits to spare. Those of float64 carry their rounding
    # errors along and are kept 2**64 times too small, or they could overflow.
    everything, kept, everything_errors, kept_errors = lanes
    for start in range(0, values.size, period):
        row = values[start : start + period]
        if values.itemsize == 8:
            for i in range(row.size):
                magnitude = abs(row[i]) * 2.0**-64
                _add(everything, everything_errors, i, magnitude)
                _add(kept, kept_errors, i, magnitude if abs(row[i]) > threshold else 0.0)
        else:
            for i in range(row.size):
                magnitude = abs(row[i])
                everything[i] += magnitude
                kept[i] += magnitude if magnitude > threshold else np.float32(0)


@_inline
def _clear(lanes, width, exact):  # type: ignore[no-untyped-def]
    everything, kept, everything_errors, kept_errors = lanes
    for i in range(width):
        everything[i] = 0.0
        kept[i] = 0.0
    if exact:
        for i in range(width):
            everything_errors[i] = 0.0
            kept_errors[i] = 0.0


@_inline
def _add_lanes(sums, errors, start, other, width, exact):  # type: ignore[no-untyped-def]
    """Add ``width`` lanes from ``other`` on to those from ``start`` on."""
    lower, upper = sums[start : start + width], sums[other : other + width]
    if exact:
        lower_errors, upper_errors = errors[start : start + width], errors[other : other + width]
        for i in range(width):
            _add(lower, lower_errors, i, upper[i])
            lower_errors[i] += upper_errors[i]
    else:
        for i in range(width):
            lower[i] += upper[i]


@_inline
def _fold(sums, errors, start, width, exact):  # type: ignore[no-untyped-def]
    """Sum of ``width`` lanes from ``start`` on, pairwise; the lanes are used up."""
    while width > 1:
        half = width // 2
        _add_lanes(sums, errors, start, start + width - half, half, exact)
        width -= half
    return sums[start] + errors[start] if exact else sums[start]


@_inline
def _scale(lanes, start, width, size, exact):  # type: ignore[no-untyped-def]
    everything = _fold(lanes[0], lanes[2], start, width, exact)
    kept = _fold(lanes[1], lanes[3], start, width, exact)
    epsilon = RESCALE_EPSILON * (2.0**-64 if exact else 1.0)
    ratio = (kept / size + epsilon) / (everything / size + epsilon)
    return RESCALE_NUMERATOR / (ratio + RESCALE_OFFSET)


@_inline
def _shrink_row(values, threshold, hard, scale, output):  # type: ignore[no-untyped-def]
    zero = scale - scale  # of the right type; the threshold may be infinite
    if hard:
        for i in range(values.size):
            output[i] = scale * values[i] if abs(values[i]) > threshold else zero
    else:
        for i in range(values.size):
            output[i] = scale * (values[i] - min(max(values[i], -threshold), threshold))


@_inline
def _shrink_columns(values, threshold, hard, scales, output):  # type: ignore[no-untyped-def]
    zero = scales[0] - scales[0]
    if hard:
        for i in range(values.size):
            output[i] = scales[i] * values[i] if abs(values[i]) > threshold else zero
    else:
        for i in range(values.size):
            output[i] = scales[i] * (values[i] - min(max(values[i], -threshold), threshold))


@_inline
def _write(source, target, memory_format, threshold, hard, scales, buffers):  # type: ignore[no-untyped-def]
    """Threshold and scale ``source``: all of it by ``scales[0]``, or element ``i`` by ``scales[i]``."""
    values_buffer, narrow = buffers
    for start in range(0, source.size, BLOCK):
        block = target[start : start + BLOCK]
        values = _load_values(source[start : start + BLOCK], memory_format, values_buffer)
        half = memory_format == FLOAT16 or memory_format == BFLOAT16
        # In place LLVM has to see one array, or it would fear an overlap and give up on SIMD.
        in_place = half or source.ctypes.data == target.ctypes.data
        output = values if in_place else block.view(values_buffer.dtype)
        if scales.size == 1:
            _shrink_row(values, threshold, hard, scales[0], output)
        else:
            _shrink_columns(values, threshold, hard, scales[start : start + BLOCK], output)
        if half:
            _store_values(values, memory_format, narrow, block)


@_inline
def _apply_rows(source, target, memory_format, threshold, hard, rescale, size, buffers, lanes, scales):  # type: ignore[no-untyped-def]
    """Channels of ``size`` elements each, one after the other."""
    scales[0] = 1
    exact = source.itemsize == 8
    for first in range(0, source.size, size):
        row = source[first : first + size]
        if rescale:
            _clear(lanes, LANES, exact)
            for start in range(0, size, BLOCK):
                values = _load_values(row[start : start + BLOCK], memory_format, buffers[0])
                _accumulate(values, threshold, lanes, LANES)
            scales[0] = _scale(lanes, 0, LANES, size, exact)
        _write(row, target[first : first + size], memory_format, threshold, hard, scales, buffers)


@_inline
def _apply_columns(source, target, memory_format, threshold, hard, rescale, layout, buffers):  # type: ignore[no-untyped-def]
    """Channels that alternate ``repeats`` times; as many repeats at once as make a long enough loop."""
    repeats, stride, start, stop, size = layout
    width = (stop - start) * size
    group = min(repeats, LANES // width + 1) if width == stride else 1
    lanes = np.zeros((4, group * width), np.float64)
    rows = (lanes[0], lanes[1], lanes[2], lanes[3])
    scales = np.ones(group * width, buffers[0].dtype)
    exact = source.itemsize == 8
    if rescale:
        for b in range(0, repeats, group):
            first = b * stride + start * size
            segment = source[first : first + min(group, repeats - b) * width]
            for offset in range(0, segment.size, BLOCK):
                values = _load_values(segment[offset : offset + BLOCK], memory_format, buffers[0])
                at = (rows[0][offset:], rows[1][offset:], rows[2][offset:], rows[3][offset:])
                _accumulate(values, threshold, at, BLOCK)
        for repeat in range(1, group):
            _add_lanes(rows[0], rows[2], 0, repeat * width, width, exact)
            _add_lanes(rows[1], rows[3], 0, repeat * width, width, exact)
        for c in range(0, width, size):
            scales[c : c + size] = _scale(rows, c, size, repeats * size, exact)
        for repeat in range(1, group):
            scales[repeat * width : (repeat + 1) * width] = scales[:width]
    for b in range(0, repeats, group):
        first = b * stride + start * size
        last = first + min(group, repeats - b) * width
        _write(source[first:last], target[first:last], memory_format, threshold, hard, scales, buffers)


@_jit
def apply(units, thresholds, memory_format, source_like, hard, rescale):  # type: ignore[no-untyped-def]
    """Threshold and rescale the channels of each unit; a threshold of 0 copies.

    Args:
        units: int64 ``(m, 8)``: address of the source and of the target of one slab with dimensions
            ``(repeats, channels, size)``, these three, the first and the last + 1 of the channels to
            treat, and the index into ``thresholds``. Sums run over ``repeats`` and ``size``. The two
            addresses are the same or the memory does not overlap.
        thresholds: in the compute type (float32, or float64 for FLOAT64).
        memory_format: FLOAT16, BFLOAT16, FLOAT32 or FLOAT64.
        source_like: empty array of the unsigned type that holds one element.
        hard: keep the weights above the threshold as they are, instead of shrinking them.
        rescale: multiply each channel by its scale.
    """
    # As addresses, because slices of such arrays need no reference counting.
    memory = np.empty(4 * LANES + 2 * BLOCK, np.float64)
    lane, place = memory[:0], memory.ctypes.data
    lanes = (
        array_at(place, LANES, lane),
        array_at(place + 8 * LANES, LANES, lane),
        array_at(place + 16 * LANES, LANES, lane),
        array_at(place + 24 * LANES, LANES, lane),
    )
    place += 32 * LANES
    buffers = (array_at(place, BLOCK, thresholds), array_at(place + 8 * BLOCK, BLOCK, np.empty(0, np.float32)))
    scales = array_at(place + 12 * BLOCK, 1, thresholds)
    for u in range(units.shape[0]):
        repeats, channels, size = units[u, 2], units[u, 3], units[u, 4]
        start, stop, threshold = units[u, 5], units[u, 6], thresholds[units[u, 7]]
        source = array_at(units[u, 0], repeats * channels * size, source_like)
        target = array_at(units[u, 1], repeats * channels * size, source_like)
        if threshold == 0:
            for b in range(repeats):
                first, last = (b * channels + start) * size, (b * channels + stop) * size
                target[first:last] = source[first:last]
        elif repeats == 1:
            source, target = source[start * size : stop * size], target[start * size : stop * size]
            _apply_rows(source, target, memory_format, threshold, hard, rescale, size, buffers, lanes, scales)
        else:
            layout = (repeats, channels * size, start, stop, size)
            _apply_columns(source, target, memory_format, threshold, hard, rescale, layout, buffers)
    memory[0] = 0  # still in use up to here
