import numpy as np
import pytest
import torch

from backbone import lora

MODULES = [f"blocks.{block}.mlp.{layer}" for block in range(2) for layer in ("fc1", "fc2")]


def prototypes(begun, arithmetic) -> dict[int, np.ndarray]:
    """Mean embeddings of the first task's images under the model that entered the run."""
    first = begun.tasks[0]
    seen = torch.cat([first.forget_indices, first.remain_indices])
    labels = begun.images.labels[seen].numpy()
    embeddings = arithmetic.embeddings(begun.before, begun.images.images[seen])
    return {label: embeddings[labels == label].mean(axis=0) for label in range(6)}


@pytest.mark.parametrize("number", [1, 2])
def test_prototypes_are_the_mean_embeddings_of_the_pretrained_model(begin, arithmetic, number):
    begun = begin("gs_lora_pp", number=number)
    for label, expected in prototypes(begun, arithmetic).items():
        np.testing.assert_allclose(begun.method.prototypes[label].numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("bound", "active"), [(18.0, True), (1e-3, False)])
@pytest.mark.parametrize("number", [1, 2])
def test_the_loss_is_its_formula(begin, arithmetic, number, bound, active):
    options = ("--lambda-forget", "0.2", "0.6", "--lambda-remain", "0.3", "--prototype-bound", str(bound))
    begun = begin("gs_lora_pp", "--alpha", "0.03", "--beta", "0.4", "--bound", "105", *options, number=number)
    begun.method.begin_epoch(begun.model, 3)
    batch = begun.batch()
    losses = begun.method.loss(begun.model, batch)

    images, labels = batch.split(batch.images), batch.split(batch.labels)
    embeddings = {name: arithmetic.embeddings(begun.model, images[name]) for name in ("forget", "remain")}
    entropy = {n: arithmetic.cross_entropy(arithmetic.logits_of(begun.model, e), labels[n]) for n, e in embeddings.items()}
    means = prototypes(begun, arithmetic)
    targets = {name: np.stack([means[label] for label in labels[name].tolist()]) for name in embeddings}
    distance = {name: arithmetic.kl(targets[name], embeddings[name]) for name in embeddings}
    blocks = [[], []]
    for name, parameter in begun.model.named_parameters():
        if "lora_" in name:
            blocks[int(name.split(".")[2])].append(arithmetic.array(parameter).ravel())
    sparsity = sum(np.linalg.norm(np.concatenate(block)) for block in blocks)
    far = max(0.0, bound - distance["forget"])
    assert (far > 0) == active
    forget = max(0.0, 105 - entropy["forget"])
    weight = [0.2, 0.6][number - 1]
    total = entropy["remain"] + 0.4 * forget + 0.03 * sparsity + weight * far + 0.3 * distance["remain"]
    assert losses["remain"].item() == pytest.approx(entropy["remain"], rel=1e-9)
    assert losses["forget"].item() == pytest.approx(forget, rel=1e-9)
    assert losses["sparsity"].item() == pytest.approx(sparsity, rel=1e-9)
    assert losses["prototype_forget"].item() == pytest.approx(far, rel=1e-4)
    assert losses["prototype_remain"].item() == pytest.approx(distance["remain"], rel=1e-4)
    assert losses["total"].item() == pytest.approx(total, rel=1e-5)
    assert set(losses) == {"total", "remain", "forget", "sparsity", "prototype_forget", "prototype_remain"}


@pytest.mark.parametrize(
    ("values", "number", "expected"), [(("0.2",), 2, 0.2), (("0.2", "0.6"), 2, 0.6), (("0.2", "0.6"), 3, 0.6)]
)
def test_the_prototypes_weight_may_differ_from_task_to_task(begin, values, number, expected):
    assert begin("gs_lora_pp", "--lambda-forget", *values, number=number, tasks=3).method.lambda_forget == expected


def adapters(model, arithmetic) -> dict[str, np.ndarray]:
    return {name: arithmetic.array(tensor) for name, tensor in lora.adapter_tensors(model.backbone).items()}


def assert_merged(begun, left, expected: dict[str, np.ndarray], rank: int) -> None:
    """The weights are those before plus the update of the `expected` adapters, which are also left."""
    assert left.files["adapters"].keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(left.files["adapters"][name].double().numpy(), value, rtol=1e-6, atol=1e-9)
    for module in MODULES:
        update = expected[f"{module}.lora_B"] @ expected[f"{module}.lora_A"] / rank
        weight = begun.before.backbone.get_submodule(module).weight.detach().numpy() + update
        np.testing.assert_allclose(begun.model.backbone.get_submodule(module).weight.detach().numpy(), weight, rtol=1e-9)


@pytest.mark.parametrize("decay", [0.9, 0.5])
@pytest.mark.parametrize("start", [0, 2])
def test_the_average_of_the_last_epochs_is_what_the_task_leaves(begin, arithmetic, random_adapters, start, decay):
    options = ("--ema-start", str(start), "--ema-decay", str(decay), "--rank", "4", "--negligible", "0")
    begun = begin("gs_lora_pp", *options)
    expected = None
    for epoch in range(5):
        random_adapters(begun.model, seed=epoch)
        now = adapters(begun.model, arithmetic)
        begun.method.end_epoch(begun.model, epoch)
        if epoch == start:
            expected = now
        elif epoch > start:
            expected = {name: decay * expected[name] + (1 - decay) * value for name, value in now.items()}
        for name, value in adapters(begun.model, arithmetic).items():
            np.testing.assert_array_equal(value, now[name])
    assert_merged(begun, begun.method.end_task(begun.model), expected, rank=4)


def test_a_task_of_few_epochs_is_not_averaged(begin, arithmetic, random_adapters):
    begun = begin("gs_lora_pp", "--ema-start", "4", "--rank", "4", "--negligible", "0")
    for epoch in range(4):
        random_adapters(begun.model, seed=epoch)
        begun.method.end_epoch(begun.model, epoch)
    assert_merged(begun, begun.method.end_task(begun.model), _last(begun, arithmetic, random_adapters), rank=4)


def _last(begun, arithmetic, random_adapters) -> dict[str, np.ndarray]:
    """The adapters that seed 3 gives, drawn anew on a copy of the model that entered the task."""
    copied = begun.before
    lora.add_adapters(copied.backbone, 4)
    random_adapters(copied, seed=3)
    tensors = adapters(copied, arithmetic)
    for layer in lora.adapted_layers(copied.backbone).values():
        torch.nn.init.zeros_(layer.lora_B)
    lora.merge_adapters(copied.backbone)
    return tensors


def test_each_task_averages_its_own_adapters(begin, arithmetic, random_adapters):
    begun = begin("gs_lora_pp", "--ema-start", "0", "--rank", "4", "--negligible", "0")
    begun.method.end_epoch(begun.model, 0)
    begun.method.end_task(begun.model)
    begun.before.load_state_dict(begun.model.state_dict())
    begun.method.begin_task(begun.model, begun.tasks[1], begun.images, begun.method.args.epochs)
    random_adapters(begun.model, seed=1)
    expected = adapters(begun.model, arithmetic)
    begun.method.end_epoch(begun.model, 0)
    assert_merged(begun, begun.method.end_task(begun.model), expected, rank=4)


def test_the_prototypes_stay_those_of_the_pretrained_model(begin, random_adapters):
    begun = begin("gs_lora_pp")
    before = begun.method.prototypes.clone()
    random_adapters(begun.model, seed=1)
    begun.method.end_task(begun.model)
    begun.method.begin_task(begun.model, begun.tasks[1], begun.images, begun.method.args.epochs)
    assert torch.equal(begun.method.prototypes, before)


def test_past_both_bounds_forgetting_has_no_gradient(begin):
    options = ("--bound", "0.5", "--prototype-bound", "1e-4", "--alpha", "0", "--lambda-remain", "0")
    begun = begin("gs_lora_pp", *options)
    losses = begun.method.loss(begun.model, begun.batch())
    (losses["total"] - losses["remain"]).backward()
    assert all(p.grad is None or not p.grad.any() for p in begun.model.parameters())
