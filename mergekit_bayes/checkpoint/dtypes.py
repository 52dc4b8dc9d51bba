"""The element types a safetensors file can hold, under the names its header uses.

Only facts live here (name, width, whether arithmetic applies), so that plans can be made from headers without
importing torch; `torch_dtype` is the one bridge, crossed when bytes are really read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from mergekit_bayes.errors import CheckpointError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class DTypeInfo:
    """One element type.

    Attributes:
        name: the name in a safetensors header, such as `BF16`.
        itemsize: bytes per element.
        floating: whether tensors of this type are merged by arithmetic. True for the four ordinary float
            types only: an 8-bit float is quantised storage whose scale is kept elsewhere, so it is copied
            like an integer.
        torch_name: the attribute of `torch` holding the same type.
    """

    name: str
    itemsize: int
    floating: bool
    torch_name: str


_TABLE = (
    DTypeInfo("BOOL", 1, False, "bool"),
    DTypeInfo("U8", 1, False, "uint8"),
    DTypeInfo("I8", 1, False, "int8"),
    DTypeInfo("U16", 2, False, "uint16"),
    DTypeInfo("I16", 2, False, "int16"),
    DTypeInfo("U32", 4, False, "uint32"),
    DTypeInfo("I32", 4, False, "int32"),
    DTypeInfo("U64", 8, False, "uint64"),
    DTypeInfo("I64", 8, False, "int64"),
    DTypeInfo("F8_E4M3", 1, False, "float8_e4m3fn"),
    DTypeInfo("F8_E4M3FNUZ", 1, False, "float8_e4m3fnuz"),
    DTypeInfo("F8_E5M2", 1, False, "float8_e5m2"),
    DTypeInfo("F8_E5M2FNUZ", 1, False, "float8_e5m2fnuz"),
    DTypeInfo("F8_E8M0", 1, False, "float8_e8m0fnu"),
    DTypeInfo("F16", 2, True, "float16"),
    DTypeInfo("BF16", 2, True, "bfloat16"),
    DTypeInfo("F32", 4, True, "float32"),
    DTypeInfo("F64", 8, True, "float64"),
    DTypeInfo("C64", 8, False, "complex64"),
)

DTYPES: Mapping[str, DTypeInfo] = MappingProxyType({info.name: info for info in _TABLE})
"""Every supported type, keyed by its name in a safetensors header."""

PACKED_DTYPES = frozenset({"F4", "F6_E2M3", "F6_E3M2"})
"""Types of the format that put several values into one byte; refused: no element has its own address."""

_BY_TORCH_NAME = {info.torch_name: info.name for info in _TABLE}
_FLOATS_BY_RECIPE_NAME = {info.torch_name: info.name for info in _TABLE if info.floating}


def dtype_named(name: str) -> str:
    """Returns the header name of a float type spelt as in a recipe: `bfloat16` is `BF16`.

    Args:
        name: `bfloat16`, `float16`, `float32` or `float64`.

    Raises:
        CheckpointError: any other name.
    """
    try:
        return _FLOATS_BY_RECIPE_NAME[name]
    except KeyError:
        expected = ", ".join(sorted(_FLOATS_BY_RECIPE_NAME))
        raise CheckpointError(f"dtype {name!r} is not known; expected one of {expected}") from None


def torch_dtype(name: str) -> torch.dtype:
    """Returns the torch type for a header name, such as `torch.bfloat16` for `BF16`.

    Args:
        name: a key of `DTYPES`.

    Raises:
        CheckpointError: the name is not a key of `DTYPES`.
    """
    import torch  # here only: everything else in this module serves plans, which must start without torch

    if name not in DTYPES:
        raise CheckpointError(f"dtype {name!r} is not known; expected one of {', '.join(DTYPES)}")
    dtype = getattr(torch, DTYPES[name].torch_name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def dtype_of(tensor: torch.Tensor) -> str:
    """Returns the header name of a tensor's type, such as `BF16`.

    Args:
        tensor: any tensor.

    Raises:
        CheckpointError: a safetensors file cannot hold this type.
    """
    try:
        return _BY_TORCH_NAME[str(tensor.dtype).removeprefix("torch.")]
    except KeyError:
        raise CheckpointError(f"{tensor.dtype} cannot be stored in a safetensors file") from None
