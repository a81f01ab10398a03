import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from backbone import lora
from backbone.blocks import Halves, block_names
from backbone.onnx_graph import OnnxBackbone, read_onnx, write_onnx_weights
from tests.onnx_models import DIM, SIZE, small_onnx
from util.runtime.errors import RunError, UsageError

IMAGES = torch.rand(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)) * 2 - 1


def run(path, images: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])


def built(path) -> tuple[OnnxBackbone, torch.Tensor]:
    graph, size, _, state = read_onnx(path)
    backbone = OnnxBackbone(graph, size or SIZE)
    backbone.load_state_dict(state)
    return backbone.eval(), graph


@pytest.mark.parametrize(
    "how", [{}, {"opset": 9}, {"opset": 18}, {"opset": 21}, {"channels_last": True}, {"residual": False}], ids=str
)
@torch.no_grad()
def test_it_computes_what_onnxruntime_does_and_comes_back_with_other_weights(tmp_path, how):
    path = small_onnx(tmp_path / "model.onnx", **how)
    backbone, graph = built(path)
    given = IMAGES.permute(0, 2, 3, 1).contiguous() if how.get("channels_last") else IMAGES
    torch.testing.assert_close(backbone(IMAGES), run(path, given), rtol=1e-4, atol=1e-5)
    assert backbone.num_features == DIM
    for parameter in backbone.parameters():
        parameter.mul_(1.1)
    onnx.save(write_onnx_weights(backbone, graph), tmp_path / "other.onnx")
    torch.testing.assert_close(backbone(IMAGES), run(tmp_path / "other.onnx", given), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(run(tmp_path / "other.onnx", given), run(path, given), rtol=1e-2)
    before, after = onnx.load(path), onnx.load(tmp_path / "other.onnx")
    for part in (before, after):
        for tensor in part.graph.initializer:
            tensor.ClearField("raw_data")
    assert before == after  # names, opset, inputs and outputs


def test_its_blocks_are_those_between_the_residual_additions(tmp_path):
    backbone, _ = built(small_onnx(tmp_path / "model.onnx"))
    assert block_names(backbone) == ["blocks.0", "blocks.1"]
    lora.add_adapters(backbone, 2)
    convs = ["blocks.0.block0/conv1/Conv", "blocks.0.block0/conv2/Conv", "blocks.1.block1/conv1/Conv"]
    assert [*lora.adapted_layers(backbone)] == [*convs, "blocks.1.block1/conv2/Conv", "blocks.1.block1/short/Conv"]
    assert list(lora.adapter_groups(backbone)) == ["blocks.0", "blocks.1"]
    assert Halves(backbone, SIZE).names == ["blocks.0"]
    plain, _ = built(small_onnx(tmp_path / "plain.onnx", residual=False))
    assert len(block_names(plain)) > 4  # one begins with each layer


def test_adapters_come_back_merged_in_the_graph(tmp_path):
    path = small_onnx(tmp_path / "model.onnx")
    backbone, graph = built(path)
    lora.add_adapters(backbone, 2, "all")
    for layer in lora.adapted_layers(backbone).values():
        torch.nn.init.normal_(layer.lora_B)
    expected = backbone(IMAGES)
    lora.merge_adapters(backbone)
    onnx.save(write_onnx_weights(backbone, graph), tmp_path / "forgotten.onnx")
    torch.testing.assert_close(run(tmp_path / "forgotten.onnx", IMAGES), expected.detach(), rtol=1e-4, atol=1e-5)


def test_a_graph_is_kept_without_its_large_weights(tmp_path):
    path = small_onnx(tmp_path / "model.onnx")
    model = onnx.load(path)
    large = numpy_helper.from_array(np.ones((64, 8, 3, 3), np.float32), "block0.conv1.weight")
    next(t for t in model.graph.initializer if t.name == "block0.conv1.weight").CopyFrom(large)
    onnx.save(model, path)
    graph, *_ = read_onnx(path)
    kept = {tensor.name: tensor for tensor in onnx.load_from_string(graph.numpy().tobytes()).graph.initializer}
    assert len(graph) < path.stat().st_size - 4 * 64 * 8 * 9 + 1000
    assert not kept["block0.conv1.weight"].raw_data
    assert kept["fc.bias"].raw_data


@pytest.mark.parametrize(("first", "mean"), [("Sub", 0.0), ("Mul", 0.0), ("Conv", None)])
def test_a_graph_that_begins_with_arithmetic_takes_pixels_as_they_are(tmp_path, first, mean):
    path = small_onnx(tmp_path / "model.onnx")
    if first != "Conv":
        model = onnx.load(path)
        model.graph.initializer.append(numpy_helper.from_array(np.ones((1, 3, 1, 1), np.float32), "value"))
        model.graph.node.insert(0, helper.make_node(first, ["images", "value"], ["scaled"], name="first"))
        model.graph.node[1].input[0] = "scaled"
        onnx.save(model, path)
    _, size, pixels, _ = read_onnx(path)
    assert size == SIZE
    assert pixels == ({} if mean is None else {"mean": [0.0] * 3, "std": [1 / 255] * 3})


def test_what_is_no_recognizer_is_told_in_a_line(tmp_path):
    (tmp_path / "text.onnx").write_text("not a model")
    with pytest.raises(UsageError, match=r"text.onnx is no ONNX model"):
        read_onnx(tmp_path / "text.onnx")
    vector = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 5])
    other = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 5])
    relu = helper.make_graph([helper.make_node("Relu", ["x"], ["y"], name="r")], "g", [vector], [other])
    onnx.save(helper.make_model(relu, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), tmp_path / "vector.onnx")
    with pytest.raises(UsageError, match="not a batch of RGB images"):
        read_onnx(tmp_path / "vector.onnx")
    images = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8])
    two = helper.make_graph([helper.make_node("Add", ["x", "z"], ["y"], name="a")], "g", [images, vector], [other])
    two.input[1].name = "z"
    onnx.save(helper.make_model(two, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), tmp_path / "two.onnx")
    with pytest.raises(UsageError, match=r"two.onnx has 2 inputs, x, z: one is needed"):
        read_onnx(tmp_path / "two.onnx")
    strange = helper.make_graph([helper.make_node("Hardmax", ["x"], ["y"], name="h")], "g", [images], [other])
    onnx.save(helper.make_model(strange, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), tmp_path / "hard.onnx")
    with pytest.raises(UsageError, match="cannot be converted by onnx2torch"):
        read_onnx(tmp_path / "hard.onnx")


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224"])
def test_what_torch_exports_today_has_blocks(tmp_path, name):
    """In a newer opset, with a size that depends on the number of images."""
    sizes = {"channels": (8, 8, 16, 16), "stem_width": 8}
    if name.startswith("vit"):
        sizes = {"img_size": SIZE, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    network = nn.Sequential(timm.create_model(name, num_classes=DIM, **sizes), Unit()).eval()
    names = {"input_names": ["images"], "dynamic_shapes": [{0: torch.export.Dim("n")}]}
    torch.onnx.export(network, (IMAGES,), tmp_path / "model.onnx", dynamo=True, verbose=False, **names)
    backbone, _ = built(tmp_path / "model.onnx")
    torch.testing.assert_close(backbone(IMAGES), network(IMAGES), rtol=1e-4, atol=1e-5)
    assert len(block_names(backbone)) == 4


class Unit(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(x)


def test_half_precision_weights_come_back_in_half_precision(tmp_path):
    path = small_onnx(tmp_path / "model.onnx")
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    onnx.save(model, path)
    backbone, graph = built(path)
    torch.testing.assert_close(backbone(IMAGES), run(path, IMAGES.half()).float(), rtol=0.05, atol=0.02)
    after = write_onnx_weights(backbone, graph)
    assert after.graph.initializer == model.graph.initializer


def test_a_weight_without_a_place_in_the_graph_is_told(tmp_path):
    backbone, graph = built(small_onnx(tmp_path / "model.onnx"))
    backbone.blocks[0].register_parameter("strange", torch.nn.Parameter(torch.ones(3)))
    with pytest.raises(RunError, match=r"1 weights have no place in the ONNX graph, blocks.0.strange first"):
        write_onnx_weights(backbone, graph)
