"""Convert tensors for an output, with one rounding; find NaN in them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BLOCK_NUMEL = 1 << 16  # elements that are converted at a time, to save memory


def check_dtype(what: str, dtype: torch.dtype | None) -> None:
    """Raise ValueError unless `dtype` is None or floating."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(
            f"{what} needs a floating torch.dtype, got dtype={dtype!r}; leave it out, or pass torch.bfloat16"
        )


def checked_cast(name: str, tensor: Tensor, dtype: torch.dtype, advice: str = "choose torch.bfloat16") -> Tensor:
    """Return `tensor` in `dtype`, rounded once; ValueError if a finite value overflows. NaN and infinity are kept."""
    if dtype == tensor.dtype:
        return tensor
    result, info = _rounded(tensor, dtype), torch.finfo(dtype)
    if info.max < torch.finfo(tensor.dtype).max:
        limit = info.max + info.eps * 2.0 ** (math.frexp(info.max)[1] - 2)  # values below it round to info.max
        values = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # 8-bit dtypes have no comparison
        is_large = (values >= limit) | (values <= -limit)
        if is_large.any() and len(lost := values[is_large & (result.to(values.dtype) != values)]):
            raise ValueError(
                f"a tensor needs values that {dtype} can hold, got {lost.abs().max():g} in {name}; {advice}"
            )
    return result


def _rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `tensor.to(dtype)`. Torch rounds float64 twice on its way to a short dtype: first to float32."""
    if tensor.dtype != torch.float64 or dtype.itemsize > 2:
        return tensor.to(dtype)
    result = torch.empty(tensor.shape, dtype=dtype)
    for part, values in zip(result.view(-1).split(BLOCK_NUMEL), tensor.reshape(-1).split(BLOCK_NUMEL), strict=True):
        nearest = values.float()
        # Of the two floats around a value that is between them, take the one with an odd last bit: no second tie.
        other = nearest.nextafter(torch.where(values > nearest, torch.inf, -torch.inf).float())
        part.copy_(torch.where((nearest != values) & (nearest.view(torch.int32) & 1 == 0), other, nearest))
    return result


def has_nan(tensor: Tensor) -> bool:
    """Return whether an element is NaN, in one pass that needs no memory."""
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return False
    if tensor.dtype.itemsize == 1:  # 8-bit dtypes have no comparison
        return any(bool(part.float().isnan().any()) for part in tensor.flatten().split(BLOCK_NUMEL))
    return bool(tensor.aminmax().max.isnan())
