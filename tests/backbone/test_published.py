"""Published checkpoints against plain-numpy arithmetic of the published model, written from its description alone."""

import math

import numpy as np
import pytest
import timm
import torch

from backbone.lora import add_adapters
from backbone.published import from_published, is_published, to_published
from backbone.recognizer import Architecture, Recognizer, build_recognizer
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


def build(state: dict[str, torch.Tensor]) -> Recognizer:
    """Our model with the weights and adapters of a published state dict."""
    architecture, weights, adapters = from_published(state)
    model = build_recognizer(architecture).to(state["cls_token"].dtype)
    if adapters:
        add_adapters(model.backbone, RANK)
    model.load_state_dict(weights | {f"backbone.{key}": tensor for key, tensor in adapters.items()})
    return model.eval()


IMAGES = np.random.default_rng(1).random((3, 3, IMAGE, IMAGE), dtype=np.float32)


@pytest.mark.parametrize("patch", [8, 12])
@pytest.mark.parametrize("lora", [False, True])
def test_embeddings_equal_the_published_model_in_numpy(patch, lora):
    state = random_state(patch, lora=lora)
    expected = numpy_embeddings(state, IMAGES, attention_scale=DIM**-0.5)
    with torch.no_grad():
        ours = build(state).backbone(torch.from_numpy(IMAGES)).numpy()
        double = {key: tensor.double() for key, tensor in state.items()}
        exact = build(double).backbone(torch.from_numpy(IMAGES).double()).numpy()
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
    again = to_published(build(state))
    assert again.keys() == state.keys()
    for key, tensor in state.items():
        rows = dim if key.endswith("to_qkv.weight") else 0
        assert torch.equal(again[key][rows:], tensor[rows:]), key
        # The factor is a power of two at dim 256 = 64 · 2², and irrational at the others.
        assert not rows or ulps(again[key][:rows], tensor[:rows]) <= (0 if dim == 256 else 1)
    # Whatever the first conversion rounded, the loaded model stays the same from then on.
    (ours, *first), (reloaded, *second) = from_published(state), from_published(again)
    assert ours == reloaded
    for a, b in zip(first, second, strict=True):
        assert_same(b, a)


def test_round_trip_of_our_model_keeps_the_embeddings():
    torch.manual_seed(0)
    sizes = {"depth": DEPTH, "embed_dim": DIM, "num_heads": HEADS}
    model = build_recognizer(Architecture("face_vit_p12s8_d6", CLASSES, IMAGE, model_options=sizes)).eval()
    published = to_published(model)
    again = build(published)
    for key, tensor in model.state_dict().items():
        found = again.state_dict()[key]
        assert torch.equal(found, tensor) or (key.endswith("qkv.weight") and ulps(found, tensor) == 1)
    assert_same(to_published(again), published)
    with torch.no_grad():
        # In float64, where only the rounding of the weights is left.
        images = torch.from_numpy(IMAGES).double()
        ours, theirs = model.backbone.double()(images), again.backbone.double()(images)
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6)


def test_query_rows_are_rounded_once():
    state = random_state(dim=512)
    qkv = state["transformer.layers.0.0.fn.fn.to_qkv.weight"]
    ours = from_published(state)[1]["backbone.blocks.0.attn.qkv.weight"]
    expected = (qkv[:512].numpy().astype(np.longdouble) * np.sqrt(np.longdouble(1) / 8)).astype(np.float32)
    np.testing.assert_array_equal(ours[:512].numpy(), expected)
    assert torch.equal(ours[512:], qkv[512:])


def test_multi_gpu_prefix():
    state = random_state(lora=True)
    prefixed = {f"module.{key}": tensor for key, tensor in state.items()}
    assert is_published(prefixed)
    (architecture, *ours), (expected, *theirs) = from_published(prefixed), from_published(state)
    assert architecture == expected
    for a, b in zip(ours, theirs, strict=True):
        assert_same(a, b)


def test_is_published():
    assert is_published(random_state())
    assert is_published({"transformer.layers.0.0.fn.norm.weight": torch.ones(3)})
    assert not is_published(timm.create_model("face_vit_tiny").state_dict())
    assert not is_published({}) and not is_published({3: None})


@pytest.mark.parametrize("patch", [8, 12])
def test_architecture(patch):
    sizes = {"depth": 2, "embed_dim": 128, "num_heads": 2, "mlp_ratio": 1.5}
    expected = Architecture(f"face_vit_p{patch}s8_d6", CLASSES, IMAGE, "cosface", sizes)
    assert from_published(random_state(patch))[0] == expected


@pytest.mark.parametrize("name", ["face_vit_p8s8_d6", "face_vit_p8s8_d12", "face_vit_p8s8_d18", "face_vit_p12s8_d6"])
def test_architecture_of_the_registered_models(name):
    state = to_published(build_recognizer(Architecture(name, 10, 112)))
    sizes = {"depth": int(name.rpartition("_d")[2]), "embed_dim": 512, "mlp_ratio": 4.0, "num_heads": 8}
    assert from_published(state)[0] == Architecture(name, 10, 112, "cosface", sizes)


def test_a_head_with_bias_is_a_softmax_and_the_margin_is_told():
    state = random_state()
    assert from_published(state, "arcface")[0].head == "arcface"
    architecture, weights, _ = from_published(state | {"loss.bias": torch.ones(CLASSES)})
    assert architecture.head == "softmax"
    assert {key for key in weights if key.startswith("head.")} == {"head.weight", "head.bias"}
    with pytest.raises(UsageError, match=r"loss.bias is unexpected"):
        from_published(state | {"loss.bias": torch.ones(CLASSES)}, "cosface")


def test_adapter_names_and_a_single_adapted_layer():
    state = random_state(lora=True)
    adapters = from_published(state)[2]
    assert set(adapters) == {f"blocks.{i}.mlp.fc{n}.lora_{m}" for i in range(DEPTH) for n in (1, 2) for m in "AB"}
    assert adapters["blocks.1.mlp.fc2.lora_A"] is state["transformer.layers.1.1.fn.fn.net.3.lora_A"]
    one = {key: tensor for key, tensor in state.items() if "lora" not in key or ".1.1.fn.fn.net.3." in key}
    assert set(from_published(one)[2]) == {"blocks.1.mlp.fc2.lora_A", "blocks.1.mlp.fc2.lora_B"}


L0, L1 = LAYER.format(0), LAYER.format(1)
FFN = f"{L0}1.fn.fn.net.0."
DAMAGES = {
    "missing": ({"cls_token": ...}, "cls_token is missing$"),
    "nothing but a name": ({key: ... for key in random_state() if key != "pos_embedding"}, "patch_to_embedding.+ missing"),
    "no head": ({"loss.weight": ...}, "loss.weight is missing"),
    "unexpected": ({"extra": torch.ones(1)}, "extra is unexpected$"),
    "first layer missing": ({key: ... for key in random_state() if key.startswith(L0)}, "layers.0.+ is missing"),
    "last layer in part": ({f"{L1}1.fn.norm.bias": ...}, f"{L1}1.fn.norm.bias is missing$"),
    "huge index": (
        {"transformer.layers.99999999999.1.fn.norm.bias": torch.ones(DIM)},
        "layers.2.+ is missing; .+ and 9 more",
    ),
    "wrong shape": (
        {f"{L1}1.fn.fn.net.3.weight": torch.ones(HIDDEN, DIM)},
        rf"{L1}1.fn.fn.net.3.weight has shape \(192, 128\), not \(128, 192\)$",
    ),
    "wrong dimensions": ({"pos_embedding": torch.ones(17, DIM)}, "pos_embedding is missing, empty or no tensor of 3 dim"),
    "all at once": (
        {"cls_token": ..., "extra": torch.ones(1), "mlp_head.0.bias": torch.ones(3)},
        r"cls_token is missing; extra is unexpected; mlp_head.0.bias has shape \(3,\), not \(128,\)$",
    ),
    "no tensor": ({"mlp_head.0.bias": "text"}, "mlp_head.0.bias is no float tensor"),
    "integers": ({"mlp_head.0.bias": torch.ones(DIM, dtype=torch.int64)}, "mlp_head.0.bias is no float tensor"),
    "empty tensor": ({"loss.weight": torch.ones(0, DIM)}, "loss.weight is missing, empty or"),
    "half a pair": ({f"{FFN}lora_A": torch.ones(4, DIM)}, f"{FFN}lora_B is missing$"),
    "the other half": ({f"{FFN}lora_B": torch.ones(HIDDEN, 4)}, f"{FFN}lora_B is unexpected$"),
    "ranks differ": (
        {f"{FFN}lora_A": torch.ones(4, DIM), f"{FFN}lora_B": torch.ones(HIDDEN, 3)},
        r"lora_B has shape \(192, 3\), not \(192, 4\)$",
    ),
    "attention adapters": ({f"{L0}0.fn.fn.to_qkv.lora_A": torch.ones(4, DIM)}, "to_qkv.lora_A is unexpected$"),
    "other patches": ({"patch_to_embedding.weight": torch.ones(DIM, 768)}, "patches of 768 values"),
    "narrow heads": ({"patch_to_embedding.weight": torch.ones(96, 192)}, "embeddings of 96 values"),
    "one position": ({"pos_embedding": torch.ones(1, 1, DIM)}, r"pos_embedding has shape \(1, 1, 128\), not \(1, 2, 128\)$"),
    "no square": ({"pos_embedding": torch.ones(1, 13, DIM)}, r"pos_embedding has shape \(1, 13, 128\), not \(1, 10, 128\)$"),
    "narrow attention": ({f"{L0}0.fn.fn.to_qkv.weight": torch.ones(3 * 64, DIM)}, r"to_qkv.weight has shape \(192, 128\)"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_state_dict_that_does_not_fit_is_refused(damage):
    changes, message = DAMAGES[damage]
    state = {key: value for key, value in (random_state() | changes).items() if value is not ...}
    with pytest.raises(UsageError, match=message) as error:
        from_published(state)
    assert "\n" not in str(error.value) and len(str(error.value)) < 700


def test_what_the_published_layout_cannot_hold(make_recognizer):
    with pytest.raises(UsageError, match="attention heads 64 wide, this model 32"):
        to_published(build_recognizer(Architecture("face_vit_tiny", CLASSES, IMAGE)))
    model = make_recognizer(embed_dim=64, num_heads=1)
    add_adapters(model.backbone, 2, place="attention")
    with pytest.raises(UsageError, match=r"published layout: .+to_qkv.lora_A is unexpected"):
        to_published(model)
    for name, message in (("vit_tiny_patch16_224", "patches of 768"), ("vit_small_patch8_224", "to_qkv.bias is unexpected")):
        with torch.device("meta"):
            other = build_recognizer(Architecture(name, CLASSES, 64, model_options={"depth": 1}))
        with pytest.raises(UsageError, match=message):
            to_published(other.to_empty(device="cpu"))
