"""Tensors in another dtype, which has to hold their values."""

import math

import torch
from torch import Tensor


def checked_cast(name: str, tensor: Tensor, dtype: torch.dtype, advice: str) -> Tensor:
    """Return `tensor`, which is floating, in `dtype`; ValueError where a value is too large for it. NaN stays."""
    result, info = tensor.to(dtype), torch.finfo(dtype)
    if info.max < torch.finfo(tensor.dtype).max:
        limit = info.max + info.eps * 2.0 ** (math.frexp(info.max)[1] - 2)  # below it, the nearest is the largest
        values = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # 8 bits cannot be compared
        is_large = (values >= limit) | (values <= -limit)
        if is_large.any():
            lost = values[is_large & (result.to(values.dtype) != values)]  # infinity may stay
            if len(lost):
                raise ValueError(
                    f"a tensor needs values that {dtype} can hold, got {lost.abs().max():g} in {name}; {advice}"
                )
    return result
