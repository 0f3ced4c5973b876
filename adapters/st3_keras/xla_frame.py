"""The call frame of an XLA foreign function, read by compiled code (``xla/ffi/api/c_api.h``, major version 0).

Everything in a frame is a *word* of 8 bytes or lies behind a pointer, so a frame is read as int64. Addresses are
int64 too. These functions are inlined into a Numba ``cfunc``, which XLA may call on any thread, without the GIL.
"""

import ctypes
import re
from pathlib import Path

import numpy as np
from numba import njit

from st3_keras.linked import array, words

_inline = njit(error_model="numpy", forceinline=True)

# Words of XLA_FFI_CallFrame, of XLA_FFI_Buffer and XLA_FFI_Array, and of the metadata extension.
_EXTENSION, _API, _ARGUMENTS, _RESULT_COUNT, _RESULTS, _ATTRIBUTES, _FRAME = 1, 2, 9, 12, 14, 20, 21
_DATA, _ARRAY = 3, 2
_EXTENSION_NEXT, _METADATA, _METADATA_VERSION, _METADATA_TRAITS = 2, 3, 3, 4
_METADATA_TYPE = 1
_ERROR_CREATE = 6
"""Word of XLA_FFI_Api."""

_INTERNAL = 13
"""XLA_FFI_Error_Code_INTERNAL."""


def api_version(include: Path) -> tuple[int, int] | None:
    """Major and minor version of the interface whose headers are in this folder; None if there are none."""
    header = include / "xla/ffi/api/c_api.h"
    text = header.read_text(encoding="utf-8") if header.exists() else ""
    found = [re.search(rf"#define XLA_FFI_API_{part} (\d+)", text) for part in ("MAJOR", "MINOR")]
    major, minor = (int(match[1]) if match else None for match in found)
    return None if major is None or minor is None else (major, minor)


@_inline
def argument(frame, index):  # type: ignore[no-untyped-def]
    """Address of an argument's first element."""
    return words(words(words(frame, _FRAME)[_ARGUMENTS], index + 1)[index], _DATA + 1)[_DATA]


@_inline
def result(frame, index):  # type: ignore[no-untyped-def]
    """Address of a result's first element."""
    return words(words(words(frame, _FRAME)[_RESULTS], index + 1)[index], _DATA + 1)[_DATA]


@_inline
def result_count(frame):  # type: ignore[no-untyped-def]
    """Number of results."""
    return words(frame, _FRAME)[_RESULT_COUNT]


@_inline
def attribute(frame, index):  # type: ignore[no-untyped-def]
    """Number of elements and address of an attribute that is an array; attributes are in order of their names."""
    value = words(words(words(frame, _FRAME)[_ATTRIBUTES], index + 1)[index], _ARRAY + 1)
    return value[1], value[_ARRAY]


@_inline
def answer_metadata(frame, major, minor):  # type: ignore[no-untyped-def]
    """Say which version of the interface this is if XLA asks for it, as it does first; and whether it does."""
    extension = words(frame, _FRAME)[_EXTENSION]
    while extension != 0:
        fields = words(extension, _METADATA + 1)
        if array(extension + 8, 1, np.int32)[0] == _METADATA_TYPE:
            metadata = fields[_METADATA]
            version = array(metadata + 8 * _METADATA_VERSION, 2, np.int32)
            version[0], version[1] = major, minor
            array(metadata + 8 * _METADATA_TRAITS, 1, np.int32)[0] = 0
            return True
        extension = fields[_EXTENSION_NEXT]
    return False


class _ErrorCreate(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension", ctypes.c_void_p),
        ("message", ctypes.c_char_p),
        ("code", ctypes.c_int),
    )


def error(frame: int, message: str) -> int:
    """Address of an error for XLA, which raises it where the step is waited for; in ordinary Python code."""
    api = ctypes.c_int64.from_address(frame + 8 * _API).value
    create = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(
        ctypes.c_int64.from_address(api + 8 * _ERROR_CREATE).value
    )
    size = _ErrorCreate.code.offset + _ErrorCreate.code.size
    arguments = _ErrorCreate(size, None, message.encode(), _INTERNAL)
    return int(create(ctypes.addressof(arguments)) or 0)
