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
from llvmlite import ir
from numba import carray, config, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from st3core.reference import RESCALE_EPSILON, RESCALE_NUMERATOR, RESCALE_OFFSET, SUM_SCALE

FLOAT16, BFLOAT16, FLOAT32, FLOAT64 = range(4)
"""Memory formats; the kernels read them as integers of the same size."""

BLOCK = 1024
"""Elements that are converted and examined at a time: 4 or 8 KiB of first-level cache."""

LOOK = 256
"""Elements that are counted or summed at a time, while those that lie ``AHEAD`` of them are fetched into the cache."""

AHEAD = 1024
"""Elements; processors that fetch by themselves do so within a page only, and too late where memory is far away."""

HITS = 64
"""Elements whose comparisons make one word of bits."""

LANES = 64
"""Partial sums of a channel of float64."""

WIDE = 256
"""Partial sums of channels that alternate, up to which no memory is allocated for them."""

SHORT = 256
"""Elements of a channel up to which several are written together."""

LINE = 64
"""Bytes of a cache line; what is streamed bypasses the caches a line at a time."""

_jit = njit(nogil=True, cache=True, error_model="numpy")
_part = njit(nogil=True, error_model="numpy")
_inline = njit(nogil=True, error_model="numpy", forceinline=True)
_inline_sum = njit(nogil=True, error_model="numpy", forceinline=True, fastmath={"reassoc"})


# --- Memory -----------------------------------------------------------------------------------------

if config.DISABLE_JIT:

    def array_at(address: int, size: int, like: np.ndarray) -> np.ndarray:
        """One-dimensional view of ``size`` elements of ``like``'s dtype at ``address``."""
        if size == 0:
            return np.empty(0, like.dtype)
        buffer: Any = (ctypes.c_char * (int(size) * like.dtype.itemsize)).from_address(int(address))
        return np.ndarray((int(size),), like.dtype, buffer)

    def _stream_line(target: int, source: int) -> None:
        ctypes.memmove(int(target), int(source), LINE)

    def _end_of_stream() -> None:
        pass

    def _prefetch(address: int) -> None:
        pass

    def _hits(address: int, mask: Any, first: Any, last: Any) -> Any:
        bits = array_at(address, HITS, np.empty(0, mask.dtype)) & mask
        return sum(1 << int(i) for i in np.flatnonzero((bits >= first) & (bits < last)))

    def _lowest(hits: Any) -> int:
        return int(hits & -hits).bit_length() - 1

else:

    @intrinsic
    def _pointer(typing_context: Any, address: types.Type) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.voidptr(types.int64), generate

    @_inline
    def array_at(address, size, like):  # type: ignore[no-untyped-def]
        """One-dimensional view of ``size`` elements of ``like``'s dtype at ``address``."""
        return carray(_pointer(address), (size,), like.dtype)

    @intrinsic
    def _stream_line(typing_context: Any, target: types.Type, source: types.Type) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            line = ir.VectorType(ir.IntType(8), LINE).as_pointer()
            value = builder.load(builder.inttoptr(arguments[1], line), align=1)
            store = builder.store(value, builder.inttoptr(arguments[0], line), align=LINE)
            store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), generate

    @intrinsic
    def _prefetch(typing_context: Any, address: types.Type) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            word, pointer = ir.IntType(32), ir.IntType(8).as_pointer()
            kind = ir.FunctionType(ir.VoidType(), [pointer, word, word, word])
            function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
            read, keep, data = (ir.Constant(word, number) for number in (0, 3, 1))
            builder.call(function, [builder.inttoptr(arguments[0], pointer), read, keep, data])
            return context.get_dummy_value()

        return types.void(types.int64), generate

    def _splat(builder: Any, value: Any) -> Any:
        one = builder.insert_element(
            ir.Constant(ir.VectorType(value.type, HITS), ir.Undefined), value, ir.IntType(32)(0)
        )
        return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(ir.IntType(32), HITS), [0] * HITS))

    @intrinsic
    def _hits(typing_context: Any, address: types.Type, mask: types.Type, first: types.Type, last: types.Type) -> Any:
        """Bit ``i`` says whether the magnitude of element ``i`` from ``address`` on is in ``[first, last)``."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            place, mask, first, last = arguments
            vector = ir.VectorType(mask.type, HITS)
            elements = builder.load(builder.inttoptr(place, vector.as_pointer()), align=1)
            bits = builder.and_(elements, _splat(builder, mask))
            from_first = builder.icmp_signed(">=", bits, _splat(builder, first))
            below_last = builder.icmp_signed("<", bits, _splat(builder, last))
            return builder.bitcast(builder.and_(from_first, below_last), ir.IntType(HITS))

        return types.uint64(types.int64, mask, mask, mask), generate

    @intrinsic
    def _lowest(typing_context: Any, hits: types.Type) -> Any:
        """Number of the lowest bit that is set."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.cttz(arguments[0], ir.IntType(1)(1))

        return types.uint64(types.uint64), generate

    @intrinsic
    def _end_of_stream(typing_context: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            builder.fence("seq_cst")  # what was streamed is visible to whoever learns that the work is done
            return context.get_dummy_value()

        return types.void(), generate


@_inline
def _fetch(source, start, size):  # type: ignore[no-untyped-def]
    """Begin to load elements into the first-level cache; they may lie beyond the end."""
    place = source.ctypes.data + start * source.itemsize
    for line in range(0, size * source.itemsize, LINE):
        _prefetch(place + line)


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
        bits[i] |= (np.uint32(source[i]) >> np.uint32(15)) << np.uint32(31)


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
        magnitude = bits[i] & np.uint32(0x7FFFFFFF)  # without the sign, NaN patterns can't wrap around to zero
        rounded = magnitude + np.uint32(0x7FFF) + ((magnitude >> np.uint32(16)) & np.uint32(1))
        target[i] = np.uint16((np.uint32(rounded) >> np.uint32(16)) | ((bits[i] >> np.uint32(16)) & np.uint32(0x8000)))


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


@_part
def _load_keys(source, memory_format, scale, narrow, magnitudes):  # type: ignore[no-untyped-def]
    if magnitudes.itemsize == 4:
        _load_float32_magnitudes(source, memory_format, scale, magnitudes.view(np.float32))
    else:
        wide = magnitudes.view(np.float64)
        _load_float64_magnitudes(source, memory_format, scale, narrow, wide)


@_inline
def _infinity(memory_format):  # type: ignore[no-untyped-def]
    if memory_format == FLOAT16:
        return np.uint64(0x7C00)
    if memory_format == BFLOAT16:
        return np.uint64(0x7F80)
    if memory_format == FLOAT32:
        return np.uint64(0x7F800000)
    return np.uint64(0x7FF0000000000000)


@_inline
def _key_infinity(keys):  # type: ignore[no-untyped-def]
    return keys.dtype.type(_infinity(FLOAT32 if keys.itemsize == 4 else FLOAT64))


@_part
def _key(bits, memory_format, scale, one, narrow, keys):  # type: ignore[no-untyped-def]
    """Key of one weight's bits."""
    one[0] = bits
    _load_keys(one[:1], memory_format, scale, narrow, keys[:1])
    return keys[0]


@_part
def _first_bits(key, memory_format, scale, one, narrow, keys):  # type: ignore[no-untyped-def]
    """Smallest bits of a magnitude whose key is at least ``key``, which is that of infinity at most."""
    # Dividing and widening keep the order, so an interval of keys is an interval of each tensor's own
    # bits, and these are compared where they lie.
    if scale == 1.0 and keys.itemsize == one.itemsize:
        return one.dtype.type(key)
    low, high = np.uint64(0), _infinity(memory_format)
    while low < high:
        middle = (low + high) >> np.uint64(1)
        if _key(middle, memory_format, scale, one, narrow, keys) >= key:
            high = middle
        else:
            low = middle + np.uint64(1)
    return one.dtype.type(low)


@_inline
def _count_block(block, mask, first, last):  # type: ignore[no-untyped-def]
    """Number of magnitudes below ``first`` and in ``[first, last)``, and the largest of them."""
    signed = block.dtype.type
    below, below_last, largest = signed(0), signed(0), signed(0)
    for i in range(block.size):
        bits = signed(block[i] & mask)
        below = signed(below + signed(bits < first))
        below_last = signed(below_last + signed(bits < last))
        largest = max(largest, bits)
    return np.intp(below), np.intp(below_last) - np.intp(below), largest


@_inline
def _gather_block(block, mask, first, last, found, held):  # type: ignore[no-untyped-def]
    """Append the magnitudes that are in ``[first, last)`` to the ``held`` first of ``found``; how many it holds now."""
    place, whole, size = block.ctypes.data, block.size // HITS * HITS, np.uint64(block.size)
    for start in range(0, whole, HITS):
        hits = np.uint64(_hits(place + start * block.itemsize, mask, first, last))
        while hits != 0:
            found[held] = block[np.uint64(start) + _lowest(hits)] & mask
            held += np.uint64(1)  # unsigned, so that no index is tested for being negative
            hits &= hits - np.uint64(1)
    for i in range(np.uint64(whole), size):
        bits = block.dtype.type(block[i] & mask)
        found[held] = bits
        held += np.uint64((bits >= first) & (bits < last))
    return held


@_jit
def count(chunks, scales, memory_format, magnitude_mask, interval, buffer, bins):  # type: ignore[no-untyped-def]
    """Count the keys below and inside an interval, and keep those inside in one of two ways.

    Args:
        chunks: int64 ``(m, 3)``: address, number of elements, index into ``scales``.
        scales: float64: what each tensor's magnitudes are divided by.
        memory_format: FLOAT16, BFLOAT16, FLOAT32 or FLOAT64.
        magnitude_mask: array of one signed integer of an element's size: all bits but the sign.
        interval: ``(low, high, shift)`` in the unsigned type of the keys; inside is ``low <= key < high``,
            and ``high`` is the key of infinity at most.
        buffer: takes the keys inside, until a block of them does not fit.
        bins: int64; if not empty, ``bins[(key - low) >> shift]`` is raised for each key inside instead.

    Returns:
        Number of keys below ``low``, number inside, the largest of all keys, and how many are in the
        buffer: all of those inside, unless it was too small.
    """
    low, high, shift = interval[0], interval[1], interval[2]
    keys, narrow = np.empty(2 * LOOK, interval.dtype), np.empty(2 * LOOK, np.float32)
    found = np.empty(2 * LOOK + 1, magnitude_mask.dtype)
    mask = magnitude_mask[0]  # unknown to LLVM: it would compare unsigned if it knew, which takes more instructions
    below, inside, taken, largest = 0, 0, np.intp(0), interval.dtype.type(0)
    known, first, last = 0.0, mask, mask
    for c in range(chunks.shape[0]):
        source = array_at(chunks[c, 0], chunks[c, 1], magnitude_mask)
        scale = scales[chunks[c, 2]]
        if scale != known:
            known = scale
            first = _first_bits(low, memory_format, scale, found, narrow, keys)
            last = _first_bits(high, memory_format, scale, found, narrow, keys)
        chunk_largest, held = magnitude_mask.dtype.type(0), np.uint64(0)
        for start in range(0, source.size, LOOK):
            block = source[start : start + LOOK]
            _fetch(source, start + AHEAD, LOOK)
            block_below, block_inside, block_largest = _count_block(block, mask, first, last)
            below += block_below
            chunk_largest = max(chunk_largest, block_largest)
            if block_inside > 0:
                inside += block_inside
                if bins.size > 0 or inside <= buffer.size:
                    held = _gather_block(block, mask, first, last, found, held)
            if held > LOOK or (held > 0 and start + LOOK >= source.size):  # few, but long, calls
                size, held = np.intp(held), np.uint64(0)
                if bins.size > 0:
                    _load_keys(found[:size], memory_format, scale, narrow, keys[:size])
                    for i in range(size):
                        bins[np.intp((keys[i] - low) >> shift)] += 1
                else:
                    _load_keys(found[:size], memory_format, scale, narrow, buffer[taken : taken + size])
                    taken += size
        largest = max(largest, _key(chunk_largest, memory_format, scale, found, narrow, keys))
    return below, inside, largest, taken


@_jit
def successor(chunks, scales, memory_format, magnitude_mask, key):  # type: ignore[no-untyped-def]
    """Smallest key of at least ``key[0]``; ``key[1]`` where there is none. Arguments as in :func:`count`."""
    best, mask = key[1], magnitude_mask[0]
    keys, narrow = np.empty(1, key.dtype), np.empty(1, np.float32)
    one, known, first = np.empty(1, magnitude_mask.dtype), 0.0, mask
    for c in range(chunks.shape[0]):
        source = array_at(chunks[c, 0], chunks[c, 1], magnitude_mask)
        scale = scales[chunks[c, 2]]
        if scale != known:
            known = scale
            first = _first_bits(key[0], memory_format, scale, one, narrow, keys)
        smallest = _smallest(source, mask, first)
        if smallest < mask:
            best = min(best, _key(smallest, memory_format, scale, one, narrow, keys))
    return best


@_inline
def _count_below(keys, first, second, third):  # type: ignore[no-untyped-def]
    signed = keys.dtype.type
    below_first, below_second, below_third = signed(0), signed(0), signed(0)
    for i in range(keys.size):
        below_first = signed(below_first + signed(keys[i] < first))
        below_second = signed(below_second + signed(keys[i] < second))
        below_third = signed(below_third + signed(keys[i] < third))
    return np.intp(below_first), np.intp(below_second), np.intp(below_third)


@_part
def _of_rank(keys, rank, low, high):  # type: ignore[no-untyped-def]
    """Key number ``rank`` in order, of keys in ``[low, high)``, of which a quarter is left each time."""
    signed, low, high = keys.dtype.type, np.int64(low), np.int64(high)
    while high - low > 1:
        second = low + ((high - low) >> 1)
        first, third = low + ((second - low) >> 1), second + ((high - second) >> 1)
        below_first, below_second, below_third = _count_below(keys, signed(first), signed(second), signed(third))
        if rank < below_second:
            low, high = (low, first) if rank < below_first else (first, second)
        else:
            low, high = (second, third) if rank < below_third else (third, high)
    return signed(low)


@_part
def _following(keys, key, rank):  # type: ignore[no-untyped-def]
    """Key number ``rank + 1`` in order, where ``key`` is number ``rank``."""
    up_to, _, _ = _count_below(keys, key + keys.dtype.type(1), key, key)
    all_bits = keys.dtype.type(~(np.int64(-1) << (8 * keys.itemsize - 1)))
    return key if up_to > rank + 1 else _smallest(keys, all_bits, key + keys.dtype.type(1))


@_part
def _of_ranks(keys, ranks, low, high, found):  # type: ignore[no-untyped-def]
    for j in range(ranks.size):
        if j > 0 and ranks[j] == ranks[j - 1]:
            found[j] = found[j - 1]
        elif j > 0 and ranks[j] == ranks[j - 1] + 1:
            found[j] = _following(keys, found[j - 1], ranks[j - 1])
        else:
            found[j] = _of_rank(keys, ranks[j], found[j - 1] if j > 0 else low, high)


@_jit
def of_ranks(keys, ranks, interval, found):  # type: ignore[no-untyped-def]
    """Write the keys of some ranks to ``found``.

    Args:
        keys: unsigned, the key of infinity at most, in any order; read only.
        ranks: int64, ascending: numbers of keys in order, from 0.
        interval: in the type of the keys; all of them are in ``[interval[0], interval[1])``.
        found: a key for each rank.
    """
    low, high = np.int64(interval[0]), np.int64(interval[1])  # signed too: Numba would join both kinds to float64
    if keys.itemsize == 4:  # signed, like the weights' own bits: a comparison takes one instruction less
        _of_ranks(keys.view(np.int32), ranks, low, high, found.view(np.int32))
    else:
        _of_ranks(keys.view(np.int64), ranks, low, high, found.view(np.int64))


@_jit
def search(chunks, scales, memory_format, magnitude_mask, interval, rank, few, buffer, picked):  # type: ignore[no-untyped-def]
    """The warm search of one job in one call: count, gather, and pick the keys around a rank.

    Allocates a few kilobytes of working memory and nothing else, knows no Python object, and may be called
    from other compiled code without the GIL.

    Args:
        chunks: int64 ``(m, 3)``: address, number of elements, index into ``scales``; all weights.
        scales: float64: what each tensor's magnitudes are divided by.
        memory_format: FLOAT16, BFLOAT16, FLOAT32 or FLOAT64.
        magnitude_mask: array of one signed integer of an element's size: all bits but the sign.
        interval: ``(low, high, 0)`` in the unsigned type of the keys (uint32, or uint64 if any weight of
            the model is float64): where the forecast expects the rank's key, ``low <= key < high``, and
            ``high`` is the key of infinity at most.
        rank: int64, 0-based rank of the wanted key among the keys of all ``chunks``.
        few: int64, how far the neighbours for the forecast are away, in ranks; at least 1.
        buffer: room for keys, of the interval's type; its content does not matter, before or after.
            More keys than it holds are not gathered.
        picked: 4 keys, of the interval's type; written only where the search is settled: the keys of rank
            ``rank - few``, ``rank`` (e1), ``rank + 1`` (e2; the key of infinity where there is none) and
            ``rank + few``. The two outer ones are the nearest inside the interval at least. Their bits are magnitudes:
            ``picked.view(float32)``, or float64.

    Returns:
        Whether the search is settled, the number of keys below ``low``, the number inside, and the largest
        of all keys: from the key of infinity on, a weight is NaN or infinite, and nothing is settled.
    """
    infinity = _key_infinity(interval)
    bins, ranks = np.empty(0, np.int64), np.empty(4, np.int64)
    below, inside, largest, taken = count(chunks, scales, memory_format, magnitude_mask, interval, buffer, bins)
    settled = largest < infinity and taken == inside and below <= rank < below + inside
    if settled:
        index, end = rank - below, taken - 1
        ranks[0], ranks[1] = max(index - few, 0), index
        ranks[2], ranks[3] = min(index + 1, end), min(index + few, end)
        of_ranks(buffer[:taken], ranks, interval, picked)
    if settled and rank - below == taken - 1:
        bounds = np.empty(2, interval.dtype)
        bounds[0], bounds[1] = picked[1] + interval.dtype.type(1), infinity
        picked[2] = successor(chunks, scales, memory_format, magnitude_mask, bounds)
    return settled, below, inside, largest


@_inline
def _smallest(source, mask, first):  # type: ignore[no-untyped-def]
    integer = source.dtype.type
    smallest = mask
    for i in range(source.size):
        bits = integer(source[i] & mask)
        smallest = min(smallest, bits if bits >= first else mask)
    return smallest


@_jit
def sample(chunks, scales, memory_format, magnitude_mask, stride, keys):  # type: ignore[no-untyped-def]
    """Write the key of every ``stride``-th element, starting in the middle; return how many."""
    elements = np.empty(BLOCK, magnitude_mask.dtype)
    narrow = np.empty(BLOCK, np.float32)
    taken, position = 0, stride // 2
    for c in range(chunks.shape[0]):
        source = array_at(chunks[c, 0], chunks[c, 1], magnitude_mask)
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


@_inline_sum
def _sums(values, threshold):  # type: ignore[no-untyped-def]
    """Sum of the magnitudes, and of those above the threshold; in any order, with bits to spare."""
    everything, kept = 0.0, 0.0
    for i in range(values.size):
        magnitude = abs(values[i])
        wide = np.float64(magnitude)
        everything += wide
        kept += wide if magnitude > threshold else 0.0
    return everything, kept


@_inline
def _alpha(everything, kept, size):  # type: ignore[no-untyped-def]
    """Equation 4 with a single division."""
    epsilon = RESCALE_EPSILON * size
    everything += epsilon
    return RESCALE_NUMERATOR * everything / (kept + epsilon + RESCALE_OFFSET * everything)


@_inline
def _alpha_float64(everything, kept, size):  # type: ignore[no-untyped-def]
    """Equation 4 as it is written: a float64 weight shows every rounding of its scale."""
    ratio = (kept / size + RESCALE_EPSILON) / (everything / size + RESCALE_EPSILON)
    return RESCALE_NUMERATOR / (ratio + RESCALE_OFFSET)


# Sums in float64 have no bits to spare for float64: they carry their rounding errors along, in LANES
# partial sums, and are kept SUM_SCALE times what they should be, or they could overflow.


@_inline
def _add(sums, errors, i, value):  # type: ignore[no-untyped-def]
    """Add to ``sums[i]``, and the rounding error to ``errors[i]`` (Knuth's two-sum)."""
    total = sums[i] + value
    added = total - sums[i]
    errors[i] += (sums[i] - (total - added)) + (value - added)
    sums[i] = total


@_part
def _accumulate(values, threshold, lanes, period):  # type: ignore[no-untyped-def]
    """Add magnitude ``i``, and again if it is kept, to lane ``i % period`` of the sums."""
    everything, kept, everything_errors, kept_errors = lanes
    for start in range(0, values.size, period):
        row = values[start : start + period]
        _fetch(values, start + AHEAD, row.size)
        if values.itemsize == 8:
            for i in range(row.size):
                magnitude = abs(row[i]) * SUM_SCALE
                _add(everything, everything_errors, i, magnitude)
                _add(kept, kept_errors, i, magnitude if abs(row[i]) > threshold else 0.0)
        else:
            for i in range(row.size):
                magnitude = abs(row[i])
                wide = np.float64(magnitude)
                everything[i] += wide
                kept[i] += wide if magnitude > threshold else 0.0


@_inline
def _clear(lanes, width, exact):  # type: ignore[no-untyped-def]
    lanes[0][:width], lanes[1][:width] = 0.0, 0.0
    if exact:
        lanes[2][:width], lanes[3][:width] = 0.0, 0.0


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


@_part
def _scale(lanes, start, width, size, exact):  # type: ignore[no-untyped-def]
    everything = _fold(lanes[0], lanes[2], start, width, exact)
    kept = _fold(lanes[1], lanes[3], start, width, exact)
    if exact:
        return _alpha_float64(everything, kept, SUM_SCALE * size)
    return _alpha(everything, kept, size)


@_inline
def _row_scale(row, memory_format, threshold, buffers, lanes):  # type: ignore[no-untyped-def]
    """Scale of one channel that lies in one piece."""
    if memory_format == FLOAT64:
        _clear(lanes, LANES, True)
        _accumulate(row.view(buffers[0].dtype), threshold, lanes, LANES)
        return _scale(lanes, 0, LANES, row.size, True)
    everything, kept = 0.0, 0.0
    for start in range(0, row.size, LOOK):
        _fetch(row, start + AHEAD, LOOK)
        values = _load_values(row[start : start + LOOK], memory_format, buffers[0])
        block_everything, block_kept = _sums(values, threshold)
        everything += block_everything
        kept += block_kept
    return _alpha(everything, kept, row.size)


@_inline
def _shrunk(value, threshold, hard, scale):  # type: ignore[no-untyped-def]
    """Equations 3b or 3c, and 5."""
    if hard:
        return scale * value if abs(value) > threshold else scale - scale  # zero of the right type
    return scale * (value - min(max(value, -threshold), threshold))


# Twice each, because LLVM must not take the two arrays for one that overlaps, or it gives up on SIMD.


@_inline
def _shrink_row(values, threshold, hard, scale, output):  # type: ignore[no-untyped-def]
    for i in range(values.size):
        output[i] = _shrunk(values[i], threshold, hard, scale)


@_inline
def _shrink_row_in_place(values, threshold, hard, scale):  # type: ignore[no-untyped-def]
    for i in range(values.size):
        values[i] = _shrunk(values[i], threshold, hard, scale)


@_inline
def _shrink_columns(values, threshold, hard, scales, output):  # type: ignore[no-untyped-def]
    for i in range(values.size):
        output[i] = _shrunk(values[i], threshold, hard, scales[i])


@_inline
def _shrink_columns_in_place(values, threshold, hard, scales):  # type: ignore[no-untyped-def]
    for i in range(values.size):
        values[i] = _shrunk(values[i], threshold, hard, scales[i])


@_inline
def _stream(source, target):  # type: ignore[no-untyped-def]
    """Copy without reading the target's lines into the cache first, as an ordinary store would."""
    place, itemsize = target.ctypes.data, target.itemsize
    head = min((-place % LINE) // itemsize, target.size)
    lines = (target.size - head) * itemsize // LINE
    tail = head + lines * (LINE // itemsize)
    for i in range(head):
        target[i] = source[i]
    place += head * itemsize
    for i in range(lines):
        _stream_line(place + i * LINE, source.ctypes.data + head * itemsize + i * LINE)
    rest, last = target[tail:], source[tail:]
    for i in range(rest.size):
        rest[i] = last[i]


@_inline
def _write(source, target, memory_format, threshold, hard, stream, scales, buffers):  # type: ignore[no-untyped-def]
    """Threshold and scale ``source``: all of it by ``scales[0]``, or element ``i`` by ``scales[i]``."""
    values_buffer, narrow, bits_buffer = buffers
    for start in range(0, source.size, BLOCK):
        goal = target[start : start + BLOCK]
        block = bits_buffer[: goal.size] if stream else goal
        values = _load_values(source[start : start + BLOCK], memory_format, values_buffer)
        half = memory_format == FLOAT16 or memory_format == BFLOAT16
        in_place = half or source.ctypes.data == target.ctypes.data
        own = scales[start : start + block.size]
        if scales.size == 1 and in_place:
            _shrink_row_in_place(values, threshold, hard, scales[0])
        elif scales.size == 1:
            _shrink_row(values, threshold, hard, scales[0], block.view(values_buffer.dtype))
        elif in_place:
            _shrink_columns_in_place(values, threshold, hard, own)
        else:
            _shrink_columns(values, threshold, hard, own, block.view(values_buffer.dtype))
        if half:
            _store_values(values, memory_format, narrow, block)
        if stream:
            _stream(block, goal)


@_inline
def _apply_rows(source, target, memory_format, threshold, hard, rescale, stream, size, buffers, lanes, scales):  # type: ignore[no-untyped-def]
    """Channels of ``size`` elements each, one after the other."""
    scales[0] = 1
    if rescale and size <= SHORT:
        _apply_short_rows(source, target, memory_format, threshold, hard, stream, size, buffers, lanes, scales)
        return
    for first in range(0, source.size, size):
        row = source[first : first + size]
        if rescale:
            scales[0] = _row_scale(row, memory_format, threshold, buffers, lanes)
        _write(row, target[first : first + size], memory_format, threshold, hard, stream, scales[:1], buffers)


@_part
def _apply_short_rows(source, target, memory_format, threshold, hard, stream, size, buffers, lanes, scales):  # type: ignore[no-untyped-def]
    """As many channels at once as make a long loop; each alone would mostly be what SIMD leaves over."""
    step = BLOCK // size * size
    for first in range(0, source.size, step):
        rows = source[first : first + step]
        for start in range(0, rows.size, size):
            scale = _row_scale(rows[start : start + size], memory_format, threshold, buffers, lanes)
            own = scales[start : start + (size + LANES - 1) // LANES * LANES]  # the rest is overwritten, or not used
            for i in range(own.size):
                own[i] = scale
        _write(rows, target[first : first + step], memory_format, threshold, hard, stream, scales[: rows.size], buffers)


@_part
def _column_scales(source, memory_format, threshold, layout, buffers, lanes, scales):  # type: ignore[no-untyped-def]
    """Scales of channels that alternate, for each element of as many repeats as ``scales`` is long."""
    repeats, stride, start, stop, size = layout
    width, period, exact = (stop - start) * size, scales.size, source.itemsize == 8
    _clear(lanes, period, exact)
    step = BLOCK // period * period
    if width == stride and step > 0:
        for first in range(0, source.size, step):
            values = _load_values(source[first : first + step], memory_format, buffers[0])
            _accumulate(values, threshold, lanes, period)
    else:
        for first in range(start * size, source.size, stride):
            row = source[first : first + width]
            for offset in range(0, width, LOOK):
                values = _load_values(row[offset : offset + LOOK], memory_format, buffers[0])
                at = (lanes[0][offset:], lanes[1][offset:], lanes[2][offset:], lanes[3][offset:])
                _accumulate(values, threshold, at, LOOK)
    rows = period // width
    while rows > 1:
        half = rows // 2
        _add_lanes(lanes[0], lanes[2], 0, (rows - half) * width, half * width, exact)
        _add_lanes(lanes[1], lanes[3], 0, (rows - half) * width, half * width, exact)
        rows -= half
    if size == 1 and not exact:
        everything, kept, own = lanes[0][:width], lanes[1][:width], scales[:width]
        for c in range(width):
            own[c] = _alpha(everything[c], kept[c], repeats)
    else:
        for c in range(0, width, size):
            scales[c : c + size] = _scale(lanes, c, size, repeats * size, exact)
    while width < period:
        known, more = scales[:width], scales[width : 2 * width]
        for i in range(more.size):
            more[i] = known[i]
        width *= 2


@_inline
def _apply_columns(source, target, memory_format, threshold, hard, rescale, layout, buffers, lanes, scales):  # type: ignore[no-untyped-def]
    """Channels that alternate ``repeats`` times; as many repeats at once as make a long enough loop."""
    repeats, stride, start, stop, size = layout
    width = (stop - start) * size
    group = max(1, min(repeats, lanes[0].size // width)) if width == stride else 1
    if width > lanes[0].size:
        wide = np.empty((4, width), np.float64)
        lanes, scales = (wide[0], wide[1], wide[2], wide[3]), np.empty(width, scales.dtype)
    own = scales[: group * width]
    if rescale:
        _column_scales(source, memory_format, threshold, layout, buffers, lanes, own)
    else:
        own[:] = 1
    for b in range(0, repeats, group):
        first = b * stride + start * size
        last = first + min(group, repeats - b) * width
        # Not streamed: the lines that are read for the second time would have to come from further away.
        _write(source[first:last], target[first:last], memory_format, threshold, hard, False, own, buffers)


@_jit
def apply(units, thresholds, memory_format, source_like, hard, rescale, stream):  # type: ignore[no-untyped-def]
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
        stream: write past the caches; not in place, and elements are aligned to their size.
    """
    # As addresses, because slices of such arrays need no reference counting.
    memory = np.empty(4 * WIDE + 4 * BLOCK + LANES, np.float64)
    lane, place = memory[:0], memory.ctypes.data
    lanes = (
        array_at(place, WIDE, lane),
        array_at(place + 8 * WIDE, WIDE, lane),
        array_at(place + 16 * WIDE, WIDE, lane),
        array_at(place + 24 * WIDE, WIDE, lane),
    )
    place += 32 * WIDE
    buffers = (
        array_at(place, BLOCK, thresholds),
        array_at(place + 8 * BLOCK, BLOCK, np.empty(0, np.float32)),
        array_at(place + 16 * BLOCK, BLOCK, source_like),
    )
    scales = array_at(place + 24 * BLOCK, BLOCK + LANES, thresholds)
    for u in range(units.shape[0]):
        repeats, channels, size = units[u, 2], units[u, 3], units[u, 4]
        start, stop, threshold = units[u, 5], units[u, 6], thresholds[units[u, 7]]
        source = array_at(units[u, 0], repeats * channels * size, source_like)
        target = array_at(units[u, 1], repeats * channels * size, source_like)
        if threshold == 0:
            for b in range(repeats):
                first, last = (b * channels + start) * size, (b * channels + stop) * size
                target[first:last] = source[first:last]
        elif not rescale and stop - start == channels:
            whole = source.size
            _apply_rows(source, target, memory_format, threshold, hard, rescale, stream, whole, buffers, lanes, scales)
        elif repeats == 1:
            source, target = source[start * size : stop * size], target[start * size : stop * size]
            _apply_rows(source, target, memory_format, threshold, hard, rescale, stream, size, buffers, lanes, scales)
        else:
            layout = (repeats, channels * size, start, stop, size)
            _apply_columns(source, target, memory_format, threshold, hard, rescale, layout, buffers, lanes, scales)
    if stream:
        _end_of_stream()
    memory[0] = 0  # still in use up to here
