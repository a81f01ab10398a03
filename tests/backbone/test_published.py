"""Published checkpoints against plain-numpy arithmetic of the published model, written from its description alone."""

import math

import numpy as np
import pytest
import timm
import torch

from backbone.heads import CosFace
from backbone.lora import add_adapters
from backbone.published import from_published, is_published, published_architecture, to_published
from util.runtime.errors import UsageError

DIM, HEADS, DEPTH, IMAGE, HIDDEN, CLASSES, RANK = 128, 2, 2, 32, 192, 5, 3
TOKENS = (IMAGE // 8) ** 2 + 1
LAYER = "transformer.layers.{}."


def random_state(patch: int = 8, dim: int = DIM, lora: bool = False, seed: int = 0) -> dict[str, torch.Tensor]:
    """A published-layout state dict of random tensors, large enough that every part of the model matters."""
    rng = np.random.default_rng(seed)

    def normal(*shape, std=0.3, mean=0.0):
        return torch.from_numpy(rng.normal(mean, std, shape).astype(np.float32))

    state = {
        "pos_embedding": normal(1, TOKENS, dim),
        "cls_token": normal(1, 1, dim),
        "patch_to_embedding.weight": normal(dim, 3 * patch * patch, std=0.1),
        "patch_to_embedding.bias": normal(dim),
        "mlp_head.0.weight": normal(dim, mean=1.0),
        "mlp_head.0.bias": normal(dim),
        "loss.weight": normal(CLASSES, dim),
    }
    for layer in map(LAYER.format, range(DEPTH)):
        for norm in ("0.fn.norm", "1.fn.norm"):
            state |= {f"{layer}{norm}.weight": normal(dim, mean=1.0), f"{layer}{norm}.bias": normal(dim)}
        state |= {
            f"{layer}0.fn.fn.to_qkv.weight": normal(3 * dim, dim, std=0.12),
            f"{layer}0.fn.fn.to_out.0.weight": normal(dim, dim, std=0.1),
            f"{layer}0.fn.fn.to_out.0.bias": normal(dim),
            f"{layer}1.fn.fn.net.0.weight": normal(HIDDEN, dim, std=0.1),
            f"{layer}1.fn.fn.net.0.bias": normal(HIDDEN),
            f"{layer}1.fn.fn.net.3.weight": normal(dim, HIDDEN, std=0.1),
            f"{layer}1.fn.fn.net.3.bias": normal(dim),
        }
        if lora:
            for net, width, height in ((0, dim, HIDDEN), (3, HIDDEN, dim)):
                state[f"{layer}1.fn.fn.net.{net}.lora_A"] = normal(RANK, width, std=0.2)
                state[f"{layer}1.fn.fn.net.{net}.lora_B"] = normal(height, RANK, std=0.2)
    return state


def numpy_embeddings(state: dict[str, torch.Tensor], images: np.ndarray, attention_scale: float) -> np.ndarray:
    """The published model in evaluation mode with its adapters unmerged, in float64."""
    w = {key: tensor.double().numpy() for key, tensor in state.items()}
    gelu = np.vectorize(lambda v: 0.5 * v * (1 + math.erf(v / math.sqrt(2))))

    def norm(x, key):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * w[f"{key}.weight"] + w[f"{key}.bias"]

    def linear(x, key):
        y = x @ w[f"{key}.weight"].T
        if f"{key}.lora_A" in w:
            y = y + x @ w[f"{key}.lora_A"].T @ w[f"{key}.lora_B"].T / len(w[f"{key}.lora_A"])
        return y + w.get(f"{key}.bias", 0.0)

    grid = range(0, images.shape[-1], 8)
    if w["patch_to_embedding.weight"].shape[1] == 192:  # row, column, channel
        patches = [images[:, :, y : y + 8, x : x + 8].transpose(0, 2, 3, 1) for y in grid for x in grid]
    else:  # channel, row, column of 12×12 windows every 8 pixels, 4 pixels of zeros around the image
        padded = np.pad(images, ((0, 0), (0, 0), (4, 4), (4, 4)))
        patches = [padded[:, :, y : y + 12, x : x + 12] for y in grid for x in grid]
    flat = np.stack([patch.reshape(len(images), -1) for patch in patches], axis=1)
    x = linear(flat, "patch_to_embedding")
    x = np.concatenate([np.repeat(w["cls_token"], len(images), axis=0), x], axis=1) + w["pos_embedding"]

    for layer in map(LAYER.format, range(DEPTH)):
        q, k, v = np.split(linear(norm(x, f"{layer}0.fn.norm"), f"{layer}0.fn.fn.to_qkv"), 3, axis=-1)
        outputs = []
        for head in range(q.shape[-1] // 64):
            part = slice(64 * head, 64 * head + 64)
            scores = q[..., part] @ k[..., part].transpose(0, 2, 1) * attention_scale
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            outputs.append(scores / scores.sum(-1, keepdims=True) @ v[..., part])
        x = x + linear(np.concatenate(outputs, axis=-1), f"{layer}0.fn.fn.to_out.0")
        hidden = gelu(linear(norm(x, f"{layer}1.fn.norm"), f"{layer}1.fn.fn.net.0"))
        x = x + linear(hidden, f"{layer}1.fn.fn.net.3")
    return norm(x[:, 0], "mlp_head.0")


def build(state: dict[str, torch.Tensor]) -> torch.nn.Module:
    """Our backbone with the weights and adapters of a published state dict."""
    sizes = published_architecture(state)
    options = {key: sizes[key] for key in ("depth", "embed_dim", "num_heads", "mlp_ratio")}
    backbone = timm.create_model(sizes["model"], num_classes=0, img_size=sizes["image_size"], **options)
    weights, _, adapters = from_published(state)
    if adapters:
        add_adapters(backbone, RANK)
    backbone.to(state["cls_token"].dtype).load_state_dict(weights | adapters)
    return backbone.eval()


IMAGES = np.random.default_rng(1).random((3, 3, IMAGE, IMAGE), dtype=np.float32)


@pytest.mark.parametrize("patch", [8, 12])
@pytest.mark.parametrize("lora", [False, True])
def test_embeddings_equal_the_published_model_in_numpy(patch, lora):
    state = random_state(patch, lora=lora)
    expected = numpy_embeddings(state, IMAGES, attention_scale=DIM**-0.5)
    with torch.no_grad():
        ours = build(state)(torch.from_numpy(IMAGES)).numpy()
        double = {key: tensor.double() for key, tensor in state.items()}
        exact = build(double)(torch.from_numpy(IMAGES).double()).numpy()
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(exact, expected, rtol=0, atol=1e-12)
    assert np.abs(numpy_embeddings(state, IMAGES, attention_scale=64**-0.5) - expected).max() > 0.05


def assert_same(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)


def ulps(a: torch.Tensor, b: torch.Tensor) -> int:
    """Largest distance in units in the last place; a and b must have the same signs."""
    return int((a.view(torch.int32).long() - b.view(torch.int32).long()).abs().max())


@pytest.mark.parametrize("patch", [8, 12])
@pytest.mark.parametrize("dim", [128, 256, 512])
def test_round_trip_of_a_published_state_dict(patch, dim):
    state = random_state(patch, dim, lora=True)
    again = to_published(*from_published(state), num_heads=dim // 64)
    assert again.keys() == state.keys()
    for key, tensor in state.items():
        rows = dim if key.endswith("to_qkv.weight") else 0
        assert torch.equal(again[key][rows:], tensor[rows:]), key
        # The factor is a power of two at dim 256 = 64 · 2², and irrational at the others.
        assert not rows or ulps(again[key][:rows], tensor[:rows]) <= (0 if dim == 256 else 1)
    # Whatever the first conversion rounded, the loaded model stays the same from then on.
    for ours, reloaded in zip(from_published(state), from_published(again), strict=True):
        assert_same(reloaded, ours)


def test_round_trip_of_our_state_dict_keeps_the_embeddings():
    torch.manual_seed(0)
    sizes = {"img_size": IMAGE, "depth": DEPTH, "embed_dim": DIM, "num_heads": HEADS}
    backbone = timm.create_model("face_vit_p12s8_d6", **sizes).eval()
    head = CosFace(DIM, CLASSES)
    published = to_published(backbone.state_dict(), head.state_dict(), num_heads=HEADS)
    weights, head_state, adapters = from_published(published)
    assert torch.equal(head_state["weight"], head.weight) and not adapters
    again = build(published)
    for key, tensor in backbone.state_dict().items():
        assert torch.equal(weights[key], again.state_dict()[key])
        assert torch.equal(weights[key], tensor) or (key.endswith("qkv.weight") and ulps(weights[key], tensor) == 1)
    assert_same(to_published(weights, head_state, num_heads=HEADS), published)
    with torch.no_grad():
        # In float64, where only the rounding of the weights is left.
        images = torch.from_numpy(IMAGES).double()
        torch.testing.assert_close(again.double()(images), backbone.double()(images), rtol=0, atol=1e-6)


def test_query_rows_are_rounded_once():
    state = random_state(dim=512)
    qkv = state["transformer.layers.0.0.fn.fn.to_qkv.weight"]
    ours = from_published(state)[0]["blocks.0.attn.qkv.weight"]
    expected = (qkv[:512].numpy().astype(np.longdouble) * np.sqrt(np.longdouble(1) / 8)).astype(np.float32)
    np.testing.assert_array_equal(ours[:512].numpy(), expected)
    assert torch.equal(ours[512:], qkv[512:])


def test_multi_gpu_prefix():
    state = random_state(lora=True)
    prefixed = {f"module.{key}": tensor for key, tensor in state.items()}
    assert is_published(prefixed)
    assert published_architecture(prefixed) == published_architecture(state)
    for ours, expected in zip(from_published(prefixed), from_published(state), strict=True):
        assert_same(ours, expected)


def test_is_published():
    assert is_published(random_state())
    assert is_published({"transformer.layers.0.0.fn.norm.weight": torch.ones(3)})
    assert not is_published(timm.create_model("face_vit_tiny").state_dict())
    assert not is_published({}) and not is_published({3: None})


def test_architecture():
    sizes = {"depth": 2, "embed_dim": 128, "num_heads": 2, "mlp_ratio": 1.5, "image_size": 32, "classes": 5}
    assert published_architecture(random_state()) == sizes | {"model": "face_vit_p8s8_d6"}
    assert published_architecture(random_state(12)) == sizes | {"model": "face_vit_p12s8_d6"}


@pytest.mark.parametrize("name", ["face_vit_p8s8_d6", "face_vit_p8s8_d12", "face_vit_p8s8_d18", "face_vit_p12s8_d6"])
def test_architecture_of_the_registered_models(name):
    with torch.device("meta"):
        state = to_published(timm.create_model(name).state_dict(), num_heads=8)
    sizes = {"embed_dim": 512, "num_heads": 8, "mlp_ratio": 4.0, "image_size": 112, "classes": None}
    assert published_architecture(state) == sizes | {"model": name, "depth": int(name.rpartition("_d")[2])}


def test_mlp_widths_survive_timms_rounding():
    dim = 448
    state = random_state(dim=dim)
    for hidden in (61, 115, 122, 4 * dim):  # int(448 · (61 / 448)) is 60
        for layer in map((LAYER + "1.fn.fn.net.").format, range(DEPTH)):
            state[f"{layer}0.weight"], state[f"{layer}0.bias"] = torch.empty(hidden, dim), torch.empty(hidden)
            state[f"{layer}3.weight"] = torch.empty(dim, hidden)
        assert int(dim * published_architecture(state)["mlp_ratio"]) == hidden


def test_head_with_bias_and_without_a_head():
    state = random_state() | {"loss.bias": torch.ones(CLASSES)}
    _, head, _ = from_published(state)
    assert head.keys() == {"weight", "bias"}
    del state["loss.bias"], state["loss.weight"]
    assert from_published(state)[1] == {}


def test_adapter_names_and_a_single_adapted_layer():
    state = random_state(lora=True)
    adapters = from_published(state)[2]
    assert set(adapters) == {f"blocks.{i}.mlp.fc{n}.lora_{m}" for i in range(DEPTH) for n in (1, 2) for m in "AB"}
    assert adapters["blocks.1.mlp.fc2.lora_A"] is state["transformer.layers.1.1.fn.fn.net.3.lora_A"]
    one = {key: tensor for key, tensor in state.items() if "lora" not in key or ".1.1.fn.fn.net.3." in key}
    assert set(from_published(one)[2]) == {"blocks.1.mlp.fc2.lora_A", "blocks.1.mlp.fc2.lora_B"}


L0, L1 = LAYER.format(0), LAYER.format(1)
DAMAGES = {
    "missing": ({"cls_token": ...}, r"1 missing \(cls_token\)"),
    "nothing but a name": ({key: ... for key in random_state() if key != "pos_embedding"}, r"16 missing \(cls_token, "),
    "unexpected": ({"extra": torch.ones(1)}, r"1 unexpected \(extra\)"),
    "whole layer missing": (
        {key: ... for key in random_state() if key.startswith(L0)},
        r"11 missing \(transformer.layers.0.+, …\); 11 unexpected \(transformer.layers.1",
    ),
    "huge index": (
        {"transformer.layers.99999999999.1.fn.norm.bias": torch.ones(DIM)},
        r"11 missing \(.+\); 1 unexpected \(transformer.layers.99999999999",
    ),
    "wrong shape": (
        {f"{L1}1.fn.fn.net.3.weight": torch.ones(HIDDEN, DIM)},
        rf"1 of another shape \({L1}1.fn.fn.net.3.weight is \(192, 128\), not \(128, 192\)\)",
    ),
    "wrong dimensions": ({"pos_embedding": torch.ones(17, DIM)}, r"pos_embedding is \(17, 128\), not \(1, \?, 128\)"),
    "all at once": (
        {"cls_token": ..., "extra": torch.ones(1), "mlp_head.0.bias": torch.ones(3)},
        r"1 missing \(cls_token\); 1 unexpected \(extra\); 1 of another shape \(mlp_head.0.bias is \(3\), not",
    ),
    "no tensor": ({"mlp_head.0.bias": "text"}, "mlp_head.0.bias is no float tensor"),
    "integers": ({"mlp_head.0.bias": torch.ones(DIM, dtype=torch.int64)}, "mlp_head.0.bias is no float tensor"),
    "empty tensor": ({"loss.weight": torch.ones(0, DIM)}, r"loss.weight is \(\?, 128\)"),
    "half a pair": ({f"{L0}1.fn.fn.net.0.lora_A": torch.ones(4, DIM)}, r"1 missing \(.+0.1.fn.fn.net.0.lora_B\)"),
    "ranks differ": (
        {f"{L0}1.fn.fn.net.0.lora_A": torch.ones(4, DIM), f"{L0}1.fn.fn.net.0.lora_B": torch.ones(HIDDEN, 3)},
        r"lora_B is \(192, 3\), not \(192, 4\)",
    ),
    "attention adapters": ({f"{L0}0.fn.fn.to_qkv.lora_A": torch.ones(4, DIM)}, r"1 unexpected \(.+to_qkv.lora_A\)"),
    "bias without weight": ({"loss.weight": ..., "loss.bias": torch.ones(CLASSES)}, r"1 missing \(loss.weight\)"),
    "other patches": ({"patch_to_embedding.weight": torch.ones(DIM, 768)}, "patches of 768 values"),
    "no square": ({"pos_embedding": torch.ones(1, 13, DIM)}, "13 positions"),
    "narrow attention": (
        {f"{layer}0.fn.fn.to_qkv.weight": torch.ones(3 * 64, DIM) for layer in (L0, L1)}
        | {f"{layer}0.fn.fn.to_out.0.weight": torch.ones(DIM, 64) for layer in (L0, L1)},
        "attention 64 wide in a model 128 wide",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_state_dict_that_does_not_fit_is_refused(damage):
    changes, message = DAMAGES[damage]
    state = {key: value for key, value in (random_state() | changes).items() if value is not ...}
    with pytest.raises(UsageError, match=message) as error:
        from_published(state)
    assert "\n" not in str(error.value) and "nothing was loaded" in str(error.value) and len(str(error.value)) < 700
    with pytest.raises(UsageError, match=message):
        published_architecture(state)


def test_what_the_published_layout_cannot_hold():
    tiny = timm.create_model("face_vit_tiny")
    with pytest.raises(UsageError, match="heads of 64, this model 4 heads of 32"):
        to_published(tiny.state_dict(), num_heads=4)
    add_adapters(tiny, 2, place="attention")
    with pytest.raises(UsageError, match=r"no place for blocks.0.attn.qkv.lora_A, .+, …; save in this"):
        to_published(tiny.state_dict(), num_heads=2)
    with torch.device("meta"):
        other = timm.create_model("vit_tiny_patch16_224", num_classes=0, qkv_bias=False)
    with pytest.raises(UsageError, match=r"patches of 768 values.*nothing was saved"):
        to_published(other.state_dict(), num_heads=3)
