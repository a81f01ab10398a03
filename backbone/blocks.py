"""The blocks of any backbone, as timm names them: what each computes, and the halves of the network around one of them.

Another module stands in for a block that is looked at. The network's own forward pass does the rest.
"""

import copy
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from util.runtime.errors import UsageError, one_line
from util.runtime.files import state_mismatch


def block_names(backbone: nn.Module) -> list[str]:
    """Of the blocks in order, as timm's own layer groups have them: `blocks.3`, `stages.1.blocks.0`, `layer2.0`."""
    matcher = backbone.group_matcher(coarse=False) if hasattr(backbone, "group_matcher") else {}
    entries = matcher.get("blocks", ()) if isinstance(matcher, dict) else ()
    entries = [(entries, None)] if isinstance(entries, str) else () if callable(entries) else entries
    # An entry with a number of its own is what lies between blocks.
    patterns = [re.compile(pattern) for pattern, *number in entries if number in ([None], [])]
    names = [name for name, _ in backbone.named_modules()]
    found = [name for name in names if any(pattern.fullmatch(name) for pattern in patterns)]
    return found or [name for name in names if re.fullmatch(r"\w+\.\d+", name)]


class _StopForward(Exception):
    """What was asked for is there; the rest of the network need not run."""


class _StandIn(nn.Module):
    """Computes `function` where a block would compute its own."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.forward = function


@contextmanager
def _replaced(backbone: nn.Module, functions: dict[str, Callable[..., Any]]) -> Iterator[None]:
    blocks = {name: backbone.get_submodule(name) for name in functions}
    for name, function in functions.items():
        backbone.set_submodule(name, _StandIn(function))
    try:
        yield
    finally:
        for name, block in blocks.items():
            backbone.set_submodule(name, block)


def block_outputs(backbone: nn.Module, images: Tensor, names: Sequence[str]) -> list:
    """What each of these blocks, in order, makes of normalized images (B, 3, H, W). What comes after the last is not run."""
    outputs = []

    def recorded(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        outputs.append(block(*args, **kwargs))
        if len(outputs) == len(names):
            raise _StopForward
        return outputs[-1]

    functions = {name: partial(recorded, backbone.get_submodule(name)) for name in names}
    with _replaced(backbone, functions), suppress(_StopForward):
        backbone.forward(images)  # by itself: a compiled call would not let the blocks be exchanged
    return outputs


def as_tokens(backbone: nn.Module, output: Tensor) -> Tensor:
    """A block's output, tokens or a map of features, as tokens (B, N, dim), the prefix tokens first."""
    if output.ndim == 3:
        return output
    nhwc = getattr(backbone, "output_fmt", "NCHW") == "NHWC"
    return output.flatten(1, 2) if nhwc else output.flatten(2).transpose(1, 2)


def as_map(backbone: nn.Module, output: Tensor) -> Tensor:
    """A block's output as a map of features (B, dim, H, W), without prefix tokens."""
    tokens = as_tokens(backbone, output)
    # The last block may be computed for the class token alone, which then is the whole map.
    tokens = tokens[:, min(_prefix(backbone, tokens), tokens.shape[1] - 1) :]
    return tokens.transpose(1, 2).unflatten(2, (math.isqrt(tokens.shape[1]), -1))


def summary(backbone: nn.Module, output: Tensor) -> Tensor:
    """Of a block's output, the class token, or the mean of the tokens where there is none: (B, dim)."""
    tokens = as_tokens(backbone, output)
    return tokens[:, 0] if _prefix(backbone, tokens) else tokens.mean(dim=1)


def _prefix(backbone: nn.Module, tokens: Tensor) -> int:
    """How many tokens come before those of the square image; not every block of a model with a class token has it."""
    count, prefix = tokens.shape[1], getattr(backbone, "num_prefix_tokens", None) or 0
    if count == 1:  # the class token alone is computed
        return prefix
    return prefix if math.isqrt(count - prefix) ** 2 == count - prefix else count - math.isqrt(count) ** 2


class Halves:
    """The network cut after the block in its middle. Raises UsageError where more than that block's output crosses."""

    def __init__(self, backbone: nn.Module, image_size: int) -> None:
        blocks = block_names(backbone)
        self.names = blocks[: max(1, len(blocks) // 2)]
        weight = next(backbone.parameters())
        # No random numbers: dropout would draw others afterwards.
        images = torch.linspace(-1, 1, 6 * image_size**2).to(weight).reshape(2, 3, image_size, image_size).sin()
        called = set()
        hooks = [module.register_forward_pre_hook(lambda m, _: called.add(m)) for module in backbone.modules()]
        was_training = backbone.training
        backbone.eval()
        message = f"{type(backbone).__name__} cannot be cut in halves"
        try:
            with torch.no_grad():
                mid = self.mid(backbone, images)
                for hook in hooks:
                    hook.remove()
                whole, joined = backbone.forward(images), self.upper(backbone, images, mid)
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            raise UsageError(f"{message}: {one_line(error)}") from None
        finally:
            backbone.train(was_training)
        if not torch.is_tensor(mid) or not torch.allclose(whole, joined, rtol=1e-3, atol=1e-4):
            raise UsageError(f"{message}: more than one tensor passes from block to block")
        self.above = [*_above(backbone, "", called, blocks)]

    def mid(self, backbone: nn.Module, images: Tensor) -> Tensor:
        """Normalized images (B, 3, H, W) → what the lower half hands on, tokens or a map."""
        return block_outputs(backbone, images, self.names[-1:])[0]

    def upper(self, backbone: nn.Module, images: Tensor, mid: Tensor) -> Tensor:
        """What the lower half handed on → embeddings (B, dim). Of the images the shape alone counts."""
        functions = dict.fromkeys(self.names, lambda x, *args, **kwargs: x) | {self.names[-1]: lambda *args, **kwargs: mid}
        with _replaced(backbone, functions):
            return backbone.forward(images)

    def lower_half(self, backbone: nn.Module) -> nn.Module:
        """A copy whose state dict is that of the lower half alone."""
        half = copy.deepcopy(backbone)
        for name in self.above:
            if any(True for _ in half.get_submodule(name).parameters()):
                half.set_submodule(name, nn.Identity())
        return half

    def stop_dropout_above(self, backbone: nn.Module) -> None:
        """Put what is above the cut into evaluation mode."""
        for name in self.above:
            backbone.get_submodule(name).eval()


def _above(module: nn.Module, place: str, called: set[nn.Module], blocks: list[str]) -> Iterator[str]:
    """The modules in `module`, which is at `place`, whose forward pass begins after the cut.

    What was `called` before it is below it with all its parts, which it may use without running them, unless there are
    blocks among them.
    """
    for child_name, child in module.named_children():
        name = f"{place}{child_name}"
        if called.isdisjoint(child.modules()):
            yield name
        elif child not in called or any(block.startswith(f"{name}.") for block in blocks):
            yield from _above(child, f"{name}.", called, blocks)


def replace_lower_half(backbone: nn.Module, image_size: int, tensors: dict[str, Tensor], source: str | Path) -> None:
    """Load the state dict of a lower half, which must fit exactly."""
    half = Halves(backbone, image_size).lower_half(backbone)
    if problems := state_mismatch(tensors, half.state_dict()):
        raise UsageError(f"{source} is no lower half of this model: {problems}; use the run's own checkpoint")
    backbone.load_state_dict(tensors, strict=False)
