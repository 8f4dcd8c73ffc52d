"""The arguments of the kernel as ctypes sees them: kernel.h field by field, in its order."""

from __future__ import annotations

import ctypes

from torch import Tensor

_SCAN_ARRAYS = (
    "u delta A B C D delta_bias y last_state boundaries grad_y grad_last_state "
    "grad_u grad_delta grad_A grad_B grad_C grad_D grad_delta_bias"
)
_SCAN_NUMBERS = (
    "b d l g n A_stride D_stride delta_bias_stride "
    "softplus B_is_constant C_is_constant parts threads"
)
_SS2D_ARRAYS = (
    "x projected dt_weight dt_bias A D order y boundaries grad_y "
    "grad_x grad_projected grad_dt_weight grad_dt_bias grad_A grad_D"
)
_SS2D_NUMBERS = "b l d k n r dt_weight_stride dt_bias_stride A_stride D_stride parts threads"


class _Arguments(ctypes.Structure):
    """A struct that takes tensors for its pointers, and keeps them as long as it lives."""

    def __init__(self, **fields: Tensor | int | None) -> None:
        self.fields = fields
        super().__init__(
            **{
                name: value.data_ptr() if isinstance(value, Tensor) else value
                for name, value in fields.items()
            }
        )


def _fields(arrays: str, numbers: str) -> list[tuple[str, type]]:
    pointers = [(name, ctypes.c_void_p) for name in arrays.split()]
    return [*pointers, *((name, ctypes.c_int64) for name in numbers.split())]


class ScanArguments(_Arguments):
    """``Scan`` of kernel.h."""

    _fields_ = _fields(_SCAN_ARRAYS, _SCAN_NUMBERS)


class Ss2dArguments(_Arguments):
    """``Ss2d`` of kernel.h."""

    _fields_ = _fields(_SS2D_ARRAYS, _SS2D_NUMBERS)
