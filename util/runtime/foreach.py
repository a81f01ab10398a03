"""Operations on many small tensors in one call each: torch's multi-tensor kernels, which are private. Differentiable."""

from collections.abc import Sequence

import torch
from torch import Tensor


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """‖t‖₂ of each tensor, (number of tensors,)."""
    return torch.stack(torch._foreach_norm(tensors))


def differences(a: Sequence[Tensor], b: Sequence[Tensor]) -> Sequence[Tensor]:
    return torch._foreach_sub(a, b)


def products(a: Sequence[Tensor], b: Sequence[Tensor] | Tensor) -> Sequence[Tensor]:
    """Elementwise, tensor by tensor; or of all with one number."""
    return torch._foreach_mul(a, b)
