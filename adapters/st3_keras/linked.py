"""Memory, and the compiled kernels of the core, for other compiled code.

The kernels are called by name, where Numba would compile them into every caller once more.
"""

from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import boolean, carray, float32, float64, int32, int64, njit, types, uint32
from numba.core import cgutils
from numba.core.typing import Signature
from numba.extending import intrinsic

from st3core import kernels

_SIGNATURES = {
    "search": types.void(int64[:, ::1], float64[::1], int64, int32[::1], uint32[::1], int64, int64, *[uint32[::1]] * 2),
    "apply": types.void(int64[:, ::1], float32[::1], int64, uint32[::1], boolean, boolean, boolean),
}
"""Arguments of the kernels for float32; the same types as those of a call from Python, whose compilation they share."""


_inline = njit(error_model="numpy", forceinline=True)


@intrinsic  # type: ignore[untyped-decorator]
def _pointer(typing_context: Any, address: types.Type) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.voidptr(types.int64), generate


@_inline
def array(address, size, dtype):  # type: ignore[no-untyped-def]
    """One-dimensional view of memory."""
    return carray(_pointer(address), (size,), dtype)


@_inline
def words(address, count):  # type: ignore[no-untyped-def]
    """View of int64."""
    return carray(_pointer(address), (count,), np.int64)


@intrinsic  # type: ignore[untyped-decorator]
def call(typing_context: Any, function: types.Type, value: types.Type) -> Any:
    """Call the C function at an address, from int64 to int64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(64)
        kind = ir.FunctionType(word, [word]).as_pointer()
        return builder.call(builder.inttoptr(arguments[0], kind), arguments[1:])

    return types.int64(types.int64, types.int64), generate


def link() -> None:
    """Compile the kernels, unless that was done before, and let the linker know where they are."""
    for name in _SIGNATURES:
        compiled = _compiled(name)
        llvm.add_symbol(_symbol(name), compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name))


def _compiled(name: str) -> Any:
    kernel, arguments = getattr(kernels, name), _SIGNATURES[name].args
    kernel.compile(arguments)
    return kernel.overloads[arguments]


def _symbol(name: str) -> str:
    return f"st3core.kernels.{name}"


def _call(name: str, given: types.BaseTuple) -> Any:
    returned, wanted = _compiled(name).signature.return_type, _SIGNATURES[name].args

    def generate(context: Any, builder: Any, signature: Signature, arguments: Any) -> ir.Value:
        values = cgutils.unpack_tuple(builder, arguments[0])
        values = [context.cast(builder, *part) for part in zip(values, given, wanted, strict=True)]
        kind = context.call_conv.get_function_type(returned, wanted)
        function = cgutils.get_or_insert_function(builder.module, kind, _symbol(name))
        status, result = context.call_conv.call_function(builder, function, returned, wanted, values)
        with cgutils.if_unlikely(builder, status.is_error):
            context.call_conv.return_status_propagate(builder, status)
        return result

    return returned(given), generate


@intrinsic  # type: ignore[untyped-decorator]
def search(typing_context: Any, arguments: types.BaseTuple) -> Any:
    """:func:`st3core.kernels.search`, from the tuple of its arguments."""
    return _call("search", arguments)


@intrinsic  # type: ignore[untyped-decorator]
def apply(typing_context: Any, arguments: types.BaseTuple) -> Any:
    """:func:`st3core.kernels.apply`, from the tuple of its arguments."""
    return _call("apply", arguments)
