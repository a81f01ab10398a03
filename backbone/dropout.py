"""Dropout whose masks cost little on a CPU, where torch's own takes longer than the matrix products around it.

Eager, a mask comes from 16 random bits an element. Compiled, it comes from a hash of the element's position and a seed,
which the compiler fuses into the operations around it. Both draw from torch's default generator.
"""

import torch
from torch import Tensor, nn


class FastDropout(nn.Dropout):
    """`torch.nn.Dropout` with cheaper masks on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not 0 < self.p < 1 or x.device.type != "cpu" or x.numel() >= 2**31:  # positions are int32
            return super().forward(x)
        draw = hashed_mask if torch.compiler.is_compiling() else drawn_mask
        keep, probability = draw(x.shape, self.p)
        return x * (keep / probability).to(x.dtype)


def replace_dropout(model: nn.Module) -> None:
    """Put a `FastDropout` in the place of every plain `nn.Dropout`."""
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, FastDropout(child.p).train(child.training))


def drawn_mask(shape: torch.Size, p: float) -> tuple[Tensor, float]:
    """Which elements to keep, bool of `shape` on the CPU, and the exact probability of that: 1 − p to 16 bits."""
    count = shape.numel()
    threshold = round(p * 2**16)
    words = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    bits = words.view(torch.int16)[:count].view(shape)  # uniform from −2¹⁵ to 2¹⁵ − 1
    return bits >= threshold - 2**15, 1 - threshold / 2**16


def hashed_mask(shape: torch.Size, p: float) -> tuple[Tensor, float]:
    """As `drawn_mask`, to 32 bits, from a hash of the position and two random seeds.

    The hash is the multiply-xorshift permutation "lowbias32" of C. Wellons' hash-prospector. Of the position it sees a
    random odd multiple and a random shift: with the shift alone, two masks could be one another, moved along.
    """
    threshold = round(p * 2**32)
    seeds = torch.randint(-(2**31), 2**31, (2,), dtype=torch.int32)
    positions = torch.arange(shape.numel(), dtype=torch.int32)
    bits = hash_32(positions * (seeds[1] | 1) + seeds[0]).view(shape)
    return bits >= threshold - 2**31, 1 - threshold / 2**32


def hash_32(x: Tensor) -> Tensor:
    """A permutation of the 32-bit integers that mixes all bits; products wrap. int32 → int32, elementwise."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32)):
        # Masked, since torch's `>>` fills up with the sign.
        x = (x ^ ((x >> shift) & (2 ** (32 - shift) - 1))) * factor
    return x ^ ((x >> 16) & 0xFFFF)
