import numpy as np
import pytest
import torch
from torch import nn

from backbone import lora
from data.batches import Pass, batches
from methods.gs_lora import GSLoRA
from tests.conftest import drawn_tasks

CPU = torch.device("cpu")


def task_of(images, number: int = 1):
    options = {"num_tasks": 2, "per_task": 2, "seed": 1337, "data_ratio": 0.5}
    return drawn_tasks(images.labels, len(images.classes), **options)[number - 1]


@pytest.fixture
def begin(make_recognizer, make_images, method_arguments, cpu):
    def begin(*options: str, number: int = 1):
        images, model = make_images(), make_recognizer(dtype=torch.float64).eval()
        method = GSLoRA(method_arguments("gs_lora", "--rank", "4", *options), cpu)
        method.begin_task(model, task_of(images, number), images, method.args.epochs)
        torch.manual_seed(3)
        for layer in lora.adapted_layers(model.backbone).values():
            nn.init.normal_(layer.lora_B, std=0.1)
        return method, model, images

    return begin


def first_batch(method, images):
    (plan,) = method.passes(method.task, 0, method.epochs)
    return next(iter(batches(images, plan, torch.Generator().manual_seed(0), CPU)))


def cosface_cross_entropy(model, embeddings: torch.Tensor, labels: torch.Tensor) -> float:
    e, w = embeddings.detach().numpy(), model.head.weight.detach().numpy()
    logits = 64 * (e / np.linalg.norm(e, axis=1, keepdims=True)) @ (w / np.linalg.norm(w, axis=1, keepdims=True)).T
    rows = np.arange(len(labels))
    logits[rows, labels] -= 64 * 0.35
    return float(np.mean(np.log(np.exp(logits).sum(axis=1)) - logits[rows, labels]))


@pytest.mark.parametrize(("bound", "active"), [(105.0, True), (0.5, False)])
@pytest.mark.parametrize("grouping", lora.GROUPINGS)
def test_the_loss_is_its_formula(begin, bound, active, grouping):
    method, model, images = begin("--bound", str(bound), "--alpha", "0.03", "--beta", "0.4", "--grouping", grouping)
    batch = first_batch(method, images)
    losses = method.loss(model, batch)

    task = method.task
    embeddings = model.embed(batch.images)
    forget = torch.isin(batch.labels, torch.tensor(task.forget))
    assert int(forget.sum()) == batch.sizes["forget"]
    remain_ce = cosface_cross_entropy(model, embeddings[~forget], batch.labels[~forget].numpy())
    forget_ce = cosface_cross_entropy(model, embeddings[forget], batch.labels[forget].numpy())
    groups: dict[str, list[np.ndarray]] = {}
    for name, parameter in model.backbone.named_parameters():
        if "lora" in name:
            parts = name.split(".")
            key = {"block": parts[1], "module": ".".join(parts[:-1]), "matrix": name}[grouping]
            groups.setdefault(key, []).append(parameter.detach().numpy().ravel())
    sparsity = sum(np.linalg.norm(np.concatenate(group)) for group in groups.values())

    bounded = max(0.0, bound - forget_ce)
    assert (bounded > 0) == active
    assert losses["remain"].item() == pytest.approx(remain_ce, rel=1e-9)
    assert losses["forget"].item() == pytest.approx(bounded, rel=1e-9)
    assert losses["sparsity"].item() == pytest.approx(sparsity, rel=1e-9)
    assert losses["total"].item() == pytest.approx(remain_ce + 0.4 * bounded + 0.03 * sparsity, rel=1e-9)


def test_past_the_bound_forgetting_has_no_gradient(begin):
    method, model, images = begin("--bound", "0.5", "--alpha", "0")
    batch = first_batch(method, images)
    losses = method.loss(model, batch)
    (losses["total"] - losses["remain"]).backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_sparsity_warm_up_and_beta_per_task(begin):
    method, model, _ = begin("--sparsity-warmup-epochs", "2", "--alpha", "0.03", "--beta", "0.1", "0.7", number=2)
    assert method.beta == 0.7
    alphas = []
    for epoch in range(4):
        method.begin_epoch(model, epoch)
        alphas.append(method.alpha)
    assert alphas == [0.0, 0.0, 0.03, 0.03]
    method, _, _ = begin("--beta", "0.3", number=2)
    assert method.beta == 0.3


def test_only_adapters_train_and_the_head_never_moves(begin):
    method, model, images = begin()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"backbone.{name}" for name in lora.adapter_tensors(model.backbone)}
    method.loss(model, first_batch(method, images))["total"].backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trainable


def test_the_default_pass_pairs_forgotten_and_remaining_images(begin):
    method, _, images = begin()
    (plan,) = method.passes(method.task, 0, method.epochs)
    assert isinstance(plan, Pass)
    labels = {name: set(images.labels[indices].tolist()) for name, indices in plan.streams.items()}
    assert labels == {"forget": set(method.task.forget), "remain": set(method.task.remain)}


def scale_block(model, block: str, factor: float) -> None:
    with torch.no_grad():
        for name, layer in lora.adapted_layers(model.backbone).items():
            if name.startswith(block + "."):
                layer.lora_B.mul_(factor)


def test_a_negligible_group_is_set_to_zero_and_counted(begin):
    method, model, _ = begin()
    weights = {name: model.backbone.get_submodule(name).weight.clone() for name in lora.adapted_layers(model.backbone)}
    scale_block(model, "blocks.0", 1e-6)
    left = method.end_task(model)
    assert left.groups["zero_ratio"] == 0.5
    assert left.groups["norms"]["blocks.0"] == 0.0
    assert left.groups["norms"]["blocks.1"] > 0
    for name, before in weights.items():
        unchanged = torch.equal(model.backbone.get_submodule(name).weight, before)
        assert unchanged == name.startswith("blocks.0.")
    assert not left.files["adapters"]["blocks.0.mlp.fc1.lora_A"].any()
    assert not lora.adapted_layers(model.backbone)


def test_a_group_that_a_training_prediction_needs_is_kept(begin):
    method, model, images = begin("--negligible", "1000")
    seen = torch.cat([method.task.forget_indices, method.task.remain_indices])
    for layer in lora.adapted_layers(model.backbone).values():
        nn.init.normal_(layer.lora_B, std=3.0)

    def predictions():
        with torch.no_grad():
            return model(images.images[seen]).argmax(dim=1)

    adapted = predictions()
    for layer in lora.adapted_layers(model.backbone).values():
        layer.lora_B.data.neg_()
    different = predictions()
    for layer in lora.adapted_layers(model.backbone).values():
        layer.lora_B.data.neg_()
    assert not torch.equal(adapted, different), "the adapters must matter for this test to mean anything"
    left = method.end_task(model)
    assert left.groups["zero_ratio"] < 1
    assert torch.equal(predictions(), adapted)
