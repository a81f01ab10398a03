"""Published Face Transformer checkpoints (bare state dicts of the GS-LoRA code) ↔ this project's state dicts.

Only names and layouts differ, and one scale: the published attention multiplies q·k by dim^-0.5, timm's by
head_dim^-0.5, so the query rows of `qkv` are divided by (dim / 64)^½ on the way in and multiplied by it on the way out.
At dim 512 that is √8: some neighbouring float32 numbers become one, so no float32 file can hold the result without
rounding. It is computed in float64 and rounded once (half a unit in the last place); there and back moves a query
weight by at most one unit in the last place, and every further round trip changes nothing: a checkpoint that is loaded,
written back and loaded again is the same model bit for bit. (Of x and its image y, the one with the smaller mantissa
survives there and back, since its relative spacing is the wider.) No other tensor ever changes.

The adapters' scaling is 1/r, and a file is read as the published model reads it, with W apart from B A. (The published
training loop writes its checkpoints in evaluation mode, where its LoRA library has already added B A to W, and a file
does not say which it is.)
"""

import math
from collections import Counter
from dataclasses import dataclass

from timm.models import is_model
from torch import Tensor

from backbone import face_transformer  # noqa: F401  registers the models that are named here
from util.runtime.errors import UsageError

State = dict[str, Tensor]

# Fixed by the published code; the tensors tell only heads × HEAD_DIM.
HEAD_DIM = 64
STRIDE = 8
# Side of a patch, from the number of values of a flattened one.
PATCH_SIDES = {3 * 8 * 8: 8, 3 * 12 * 12: 12}

STEM = {
    "pos_embedding": "pos_embed",
    "cls_token": "cls_token",
    "patch_to_embedding.weight": "patch_embed.proj.weight",
    "patch_to_embedding.bias": "patch_embed.proj.bias",
    "mlp_head.0.weight": "norm.weight",
    "mlp_head.0.bias": "norm.bias",
}
BLOCK = {
    "0.fn.norm.weight": "norm1.weight",
    "0.fn.norm.bias": "norm1.bias",
    "0.fn.fn.to_qkv.weight": "attn.qkv.weight",
    "0.fn.fn.to_out.0.weight": "attn.proj.weight",
    "0.fn.fn.to_out.0.bias": "attn.proj.bias",
    "1.fn.norm.weight": "norm2.weight",
    "1.fn.norm.bias": "norm2.bias",
    "1.fn.fn.net.0.weight": "mlp.fc1.weight",
    "1.fn.fn.net.0.bias": "mlp.fc1.bias",
    "1.fn.fn.net.3.weight": "mlp.fc2.weight",
    "1.fn.fn.net.3.bias": "mlp.fc2.bias",
}
ADAPTERS = {f"1.fn.fn.net.{n}.lora_{m}": f"mlp.fc{fc}.lora_{m}" for n, fc in ((0, 1), (3, 2)) for m in "AB"}
LAYERS, BLOCKS = "transformer.layers.", "blocks."


@dataclass(frozen=True)
class _Sizes:
    """Sizes read off the tensors; 0 where no tensor of the right number of dimensions tells."""

    depth: int
    dim: int
    inner: int
    hidden: int
    tokens: int
    patch_values: int
    classes: int


def is_published(state_dict: dict) -> bool:
    """Whether the keys are the published ones, complete or not."""
    state = _without_prefix(state_dict)
    return any(key.startswith((LAYERS, "patch_to_embedding.")) or key == "pos_embedding" for key in state)


def published_architecture(state_dict: State) -> dict:
    """What the tensors say about the model: model (a timm name), depth, embed_dim, num_heads, mlp_ratio, image_size
    (pixels) and classes (None without a head). `timm.create_model` takes the first five as they are.

    Raises UsageError if the checkpoint does not fit the published layout.
    """
    state = _without_prefix(state_dict)
    sizes = _check(state)
    patch = f"face_vit_p{PATCH_SIDES[sizes.patch_values]}s{STRIDE}"
    model = f"{patch}_d{sizes.depth}"
    ratio = sizes.hidden / sizes.dim
    return {
        "model": model if is_model(model) else f"{patch}_d6",
        "depth": sizes.depth,
        "embed_dim": sizes.dim,
        "num_heads": sizes.dim // HEAD_DIM,
        # timm truncates dim · ratio, which the division may leave just below the integer that it stands for.
        "mlp_ratio": ratio if int(sizes.dim * ratio) == sizes.hidden else math.nextafter(ratio, math.inf),
        "image_size": math.isqrt(sizes.tokens - 1) * STRIDE,
        "classes": sizes.classes or None,
    }


def from_published(state_dict: State) -> tuple[State, State, State]:
    """A published state dict → state dicts of the backbone and of the head, and the adapters.

    The head's is empty where the checkpoint has none. Adapters are keyed `blocks.<i>.mlp.fc1.lora_A`, … (A (r, in),
    B (out, r), scaling 1/r). Tensors of which only the name changes are shared with the input.
    Raises UsageError, naming keys, if any is missing, unexpected or of another shape.
    """
    state = _without_prefix(state_dict)
    depth = _check(state).depth
    backbone = {ours: _from_published(ours, state[key]) for key, ours in _names(depth).items()}
    head = {key.removeprefix("loss."): tensor for key, tensor in state.items() if key.startswith("loss.")}
    adapters = {ours: state[key] for key, ours in _in_layers(ADAPTERS, depth).items() if key in state}
    return backbone, head, adapters


def to_published(
    backbone_state: State, head_state: State | None = None, adapters: State | None = None, *, num_heads: int
) -> State:
    """The inverse of `from_published`. `num_heads` is the backbone's: no tensor tells it.

    Raises UsageError for what the published layout cannot hold: heads of another width than 64, adapters outside the
    FFN, any other model than a Face Transformer.
    """
    ours = backbone_state | (adapters or {})
    depth = _depth(ours, BLOCKS)
    names = {new: key for key, new in (_names(depth) | _in_layers(ADAPTERS, depth)).items()}
    unknown = sorted(ours.keys() - names.keys())
    if unknown:
        raise UsageError(f"the published layout has no place for {_listed(unknown)}; save in this project's layout")
    state = {names[key]: _to_published(key, tensor) for key, tensor in ours.items()}
    state |= {f"loss.{key}": tensor for key, tensor in (head_state or {}).items()}
    dim = _check(state, "saved").dim
    if num_heads * HEAD_DIM != dim:
        raise UsageError(
            f"the published layout has heads of {HEAD_DIM}, this model {num_heads} heads of {dim // num_heads}; "
            "save in this project's layout"
        )
    return state


def _from_published(name: str, tensor: Tensor) -> Tensor:
    if name == "patch_embed.proj.weight":
        side = PATCH_SIDES[tensor.shape[1]]
        if side == STRIDE:
            # Flattened as (row, column, channel); the overlapping patches, by nn.Unfold, as (channel, row, column).
            return tensor.unflatten(1, (side, side, 3)).permute(0, 3, 1, 2).contiguous()
        return tensor.unflatten(1, (3, side, side))
    return _scale_queries(tensor, inverse=True) if name.endswith("attn.qkv.weight") else tensor


def _to_published(name: str, tensor: Tensor) -> Tensor:
    if name == "patch_embed.proj.weight":
        return (tensor.permute(0, 2, 3, 1) if tensor.shape[-1] == STRIDE else tensor).flatten(1).contiguous()
    return _scale_queries(tensor) if name.endswith("attn.qkv.weight") else tensor


def _scale_queries(qkv: Tensor, inverse: bool = False) -> Tensor:
    """Multiply (`inverse`: divide) the first third of the rows by (dim / 64)^½, rounding once."""
    rows, dim = len(qkv) // 3, qkv.shape[1]
    factor = math.sqrt(dim / HEAD_DIM)
    scaled = qkv.clone()
    scaled[:rows] = qkv[:rows].double() / factor if inverse else qkv[:rows].double() * factor
    return scaled


def _without_prefix(state_dict: dict) -> dict:
    """Without the `module.` that a multi-GPU model puts before each key."""
    keys = [str(key) for key in state_dict]
    prefix = "module." if all(key.startswith("module.") for key in keys) else ""
    return {key.removeprefix(prefix): value for key, value in zip(keys, state_dict.values(), strict=True)}


def _depth(state: dict, prefix: str) -> int:
    """The number of distinct layers, not the largest index: a damaged key must not make us expect a billion layers."""
    return len({key.removeprefix(prefix).partition(".")[0] for key in state if key.startswith(prefix)})


def _names(depth: int) -> dict[str, str]:
    """Published key → ours, for the whole backbone."""
    return STEM | _in_layers(BLOCK, depth)


def _in_layers(names: dict[str, str], depth: int) -> dict[str, str]:
    return {f"{LAYERS}{i}.{key}": f"{BLOCKS}{i}.{ours}" for i in range(depth) for key, ours in names.items()}


def _check(state: dict, verb: str = "loaded") -> _Sizes:
    """The sizes of a published Face Transformer; raises UsageError unless every key and shape is that of one."""
    sizes = _read_sizes(state)
    expected = _expected_shapes(state, sizes)
    found = {
        "missing": [key for key in expected if key not in state],
        "unexpected": [key for key in state if key not in expected],
        "of another shape": [
            f"{key} is {_shape_text(_shape(state[key]))}, not {_shape_text(shape)}"
            for key, shape in expected.items()
            if key in state and not _fits(_shape(state[key]), shape)
        ],
    }
    problems = [f"{len(keys)} {kind} ({_listed(keys)})" for kind, keys in found.items() if keys]
    if not problems:
        problems = _impossible_sizes(sizes)
    if problems:
        raise UsageError(
            f"not a whole Face Transformer in the published layout: {'; '.join(problems)}; nothing was {verb}"
        )
    return sizes


def _impossible_sizes(sizes: _Sizes) -> list[str]:
    problems = []
    if sizes.inner != sizes.dim or sizes.dim % HEAD_DIM:
        problems.append(
            f"attention {sizes.inner} wide in a model {sizes.dim} wide: both must be the same multiple of {HEAD_DIM}"
        )
    if sizes.patch_values not in PATCH_SIDES:
        problems.append(f"patches of {sizes.patch_values} values, not of 8×8×3 or 12×12×3")
    if math.isqrt(sizes.tokens - 1) ** 2 != sizes.tokens - 1 or sizes.tokens < 2:
        problems.append(f"{sizes.tokens} positions, which is not a class token and a square of patches")
    return problems


def _read_sizes(state: dict) -> _Sizes:
    def common(suffix: str, ndim: int, axis: int = 0) -> int:
        """The size that most layers agree on, so that a single damaged tensor is the one that is named."""
        shapes = [_shape(tensor) for key, tensor in state.items() if key.endswith(suffix)]
        counts = Counter(shape[axis] for shape in shapes if shape is not None and len(shape) == ndim)
        return counts.most_common(1)[0][0] if counts else 0

    return _Sizes(
        # An empty file is reported as lacking the first layer, too.
        depth=max(1, _depth(state, LAYERS)),
        dim=common(".fn.norm.weight", 1),
        inner=common(".fn.fn.to_qkv.weight", 2) // 3,
        hidden=common(".fn.fn.net.0.bias", 1),
        tokens=common("pos_embedding", 3, axis=1),
        patch_values=common("patch_to_embedding.weight", 2, axis=1),
        classes=common("loss.weight", 2),
    )


def _expected_shapes(state: dict, sizes: _Sizes) -> dict[str, tuple[int, ...]]:
    """Shape by published key; an unknown size is 0. The head and the adapters are expected where a part of them is."""
    dim, inner, hidden = sizes.dim, sizes.inner, sizes.hidden
    stem = {"pos_embedding": (1, sizes.tokens, dim), "cls_token": (1, 1, dim)}
    stem["patch_to_embedding.weight"] = (dim, sizes.patch_values)
    block = {"0.fn.fn.to_qkv.weight": (3 * inner, dim), "0.fn.fn.to_out.0.weight": (dim, inner)}
    block |= {"1.fn.fn.net.0.weight": (hidden, dim), "1.fn.fn.net.0.bias": (hidden,)}
    block |= {"1.fn.fn.net.3.weight": (dim, hidden)}
    shapes = {key: stem.get(key, (dim,)) for key in STEM}
    for i in range(sizes.depth):
        shapes |= {f"{LAYERS}{i}.{key}": block.get(key, (dim,)) for key in BLOCK}
        for layer, width, height in (("0", dim, hidden), ("3", hidden, dim)):
            lora_A, lora_B = (f"{LAYERS}{i}.1.fn.fn.net.{layer}.lora_{matrix}" for matrix in "AB")
            if lora_A in state or lora_B in state:
                shape = _shape(state.get(lora_A))
                rank = shape[0] if shape else 0
                shapes |= {lora_A: (rank, width), lora_B: (height, rank)}
    if "loss.weight" in state or "loss.bias" in state:
        shapes["loss.weight"] = (sizes.classes, dim)
    if "loss.bias" in state:
        shapes["loss.bias"] = (sizes.classes,)
    return shapes


def _shape(value: object) -> tuple[int, ...] | None:
    """None for anything but a floating-point tensor."""
    return tuple(value.shape) if isinstance(value, Tensor) and value.is_floating_point() else None


def _fits(shape: tuple[int, ...] | None, expected: tuple[int, ...]) -> bool:
    if shape is None or len(shape) != len(expected):
        return False
    return all(size > 0 and size == (wanted or size) for size, wanted in zip(shape, expected, strict=True))


def _shape_text(shape: tuple[int, ...] | None) -> str:
    return "no float tensor" if shape is None else f"({', '.join(str(size or '?') for size in shape)})"


def _listed(keys: list[str], most: int = 3) -> str:
    return ", ".join(keys[:most]) + (", …" if len(keys) > most else "")
