import numpy as np
import pytest
import torch

from backbone.onnx_graph import read_onnx
from backbone.recognizer import Architecture, build_recognizer, to_device
from methods import importance
from methods.importance import mean_importance
from tests.onnx_models import SIZE, small_onnx
from util.runtime.hardware import Hardware

INDICES = torch.tensor([3, 40, 11, 25, 0, 17, 30, 8])


def squared_error(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Some objective that depends on logits and labels."""
    rows = torch.arange(logits.shape[1])
    return ((logits - 10.0 * (labels[:, None] == rows)) ** 2).sum(dim=1).mean() / 100


def plain_loop(model, measure, images, parts) -> dict[str, np.ndarray]:
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    total = {n: np.zeros(p.shape) for n, p in trained.items()}
    for part in parts:
        model.zero_grad()
        squared_error(model(images.images[part]), images.labels[part]).backward()
        for n, p in trained.items():
            total[n] += measure(p.grad.numpy())
    model.zero_grad()
    return {n: t / len(parts) for n, t in total.items()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name].numpy(), value, rtol=1e-6, atol=1e-14, err_msg=name)
    assert any(value.any() for value in expected.values())


MEASURES = pytest.mark.parametrize(("measure", "plain"), [(torch.square, np.square), (torch.abs, np.abs)])


@pytest.fixture
def model(make_recognizer, cpu):
    model = to_device(make_recognizer(dtype=torch.float64).eval(), cpu)
    model.head.requires_grad_(False)
    return model


@MEASURES
@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_the_mean_over_images_is_that_of_a_plain_loop(model, make_images, cpu, monkeypatch, measure, plain, at_once):
    images = make_images()
    monkeypatch.setattr(importance, "GRADIENT_BYTES", at_once * 4 * model.num_trainable())
    assert len(INDICES) % 3
    found = mean_importance(model, squared_error, measure, images, INDICES, cpu)
    assert_equal(found, plain_loop(model, plain, images, INDICES.split(1)))


@MEASURES
@pytest.mark.parametrize("batch_size", [3, 4])
def test_the_mean_over_shuffled_batches_is_that_of_a_plain_loop(model, make_images, cpu, measure, plain, batch_size):
    images = make_images()
    torch.manual_seed(5)
    found = mean_importance(model, squared_error, measure, images, INDICES, cpu, batch_size)
    shuffled = INDICES[torch.randperm(len(INDICES), generator=torch.Generator().manual_seed(5))]
    assert_equal(found, plain_loop(model, plain, images, shuffled.split(batch_size)))


def test_chunks_have_the_size_that_fits(model, make_images, cpu, monkeypatch):
    monkeypatch.setattr(importance, "GRADIENT_BYTES", 3 * 4 * model.num_trainable())
    sizes = []
    monkeypatch.setattr(importance, "vmap", lambda f, **options: noting(sizes, torch.func.vmap(f, **options)))
    mean_importance(model, squared_error, torch.square, make_images(), INDICES, cpu)
    assert sizes == [3, 3, 2]


def noting(sizes: list[int], function):
    def call(parameters, images, labels):
        sizes.append(len(labels))
        return function(parameters, images, labels)

    return call


def test_a_model_in_training_is_measured_without_dropout_and_left_in_training(make_recognizer, make_images, cpu):
    images = make_images()
    model = to_device(make_recognizer(dtype=torch.float64, pos_drop_rate=0.5, proj_drop_rate=0.5).train(), cpu)
    found = mean_importance(model, squared_error, torch.abs, images, INDICES, cpu)
    in_batches = mean_importance(model, squared_error, torch.abs, images, INDICES, cpu, 8)
    assert model.training and model.backbone.training
    assert not any(p.grad is not None for p in model.parameters())
    assert_equal(found, plain_loop(model.eval(), np.abs, images, INDICES.split(1)))
    assert_equal(in_batches, plain_loop(model, np.abs, images, INDICES.split(8)))


@pytest.mark.parametrize("measure", [torch.square, torch.abs])
@pytest.mark.parametrize(
    "network",
    [
        Architecture("face_vit_tiny", 6, 16, model_options={"embed_dim": 32, "depth": 2, "num_heads": 2}),
        Architecture("resnet10t", 6, 32, model_options={"channels": (8, 8, 16, 16), "stem_width": 8}),
        Architecture("xcit_nano_12_p16_224", 6, 32, model_options={"embed_dim": 16, "depth": 1, "num_heads": 2}),
    ],
    ids=lambda network: network.model,
)
def test_half_precision_finds_nearly_the_same(make_images, cpu, measure, network):
    torch.manual_seed(0)
    images, model = make_images(image_size=network.image_size), to_device(build_recognizer(network).eval(), cpu)
    model.head.requires_grad_(False)
    bf16 = Hardware(torch.device("cpu"), bf16=True)
    whole, half = (
        torch.cat([value.flatten() for value in found.values()])
        for found in (mean_importance(model, squared_error, measure, images, INDICES, on) for on in (cpu, bf16))
    )
    assert half.dtype == torch.float32
    assert half.isfinite().all()
    assert not torch.equal(whole, half)
    assert np.corrcoef(whole.numpy(), half.numpy())[0, 1] > 0.9


def test_single_images_are_measured_in_full_precision(make_images, cpu, tmp_path):
    network = Architecture("model.onnx", 6, SIZE, graph=read_onnx(small_onnx(tmp_path / "model.onnx"))[0])
    images, model = make_images(image_size=SIZE), to_device(build_recognizer(network).eval(), cpu)
    model.head.requires_grad_(False)
    machines = cpu, Hardware(torch.device("cpu"), bf16=True)
    whole, half = (mean_importance(model, squared_error, torch.square, images, INDICES, on) for on in machines)
    assert all(torch.equal(whole[name], half[name]) for name in whole)
