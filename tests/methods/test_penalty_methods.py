"""L2, EWC and MAS: relabelling with replay, and a quadratic penalty."""

import io

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from methods import METHODS
from methods.penalty import QuadraticPenalty

NAMES = ["l2", "ewc", "mas"]
READINGS = [
    ("l2", ()),
    ("ewc", ("--fisher", "image")),
    ("ewc", ("--fisher", "batch")),
    ("mas", ("--importance", "image")),
    ("mas", ("--importance", "batch")),
]


def backbone_weights(model) -> dict[str, np.ndarray]:
    return {n: p.detach().numpy().copy() for n, p in model.named_parameters() if n.startswith("backbone.")}


def label_free(model, images: torch.Tensor) -> torch.Tensor:
    return 64 * normalize(model.embed(images)) @ normalize(model.head.weight).T


def with_margin(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return logits - 64 * 0.35 * torch.nn.functional.one_hot(labels, logits.shape[1])


def importance(name: str, options: tuple, model, images, indices, batch_size: int = 8) -> dict[str, np.ndarray]:
    """Ω by one backward pass an image, or a batch of the images in the order that seed 11 draws."""
    parameters = {n: p for n, p in model.named_parameters() if n.startswith("backbone.")}
    if name == "l2":
        return {n: np.ones(p.shape) for n, p in parameters.items()}
    size = batch_size if "batch" in options else 1
    order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(11))
    parts = indices[order].split(size)
    total = {n: np.zeros(p.shape) for n, p in parameters.items()}
    for part in parts:
        labels, logits = images.labels[part], label_free(model, images.images[part])
        if name == "ewc":
            objective = cross_entropy(with_margin(logits, labels), labels)
        elif size == 1:
            objective = (logits**2).sum()
        else:
            objective = (with_margin(logits, labels) ** 2).mean()
        gradients = torch.autograd.grad(objective, list(parameters.values()))
        for n, g in zip(parameters, gradients, strict=True):
            total[n] += (len(part) * g**2 if name == "ewc" else g.abs()).numpy()
    return {n: t / len(parts) for n, t in total.items()}


def quadratic(terms: list[tuple[dict, dict]], now: dict[str, np.ndarray]) -> float:
    return sum(float((omega[n] * (now[n] - centre[n]) ** 2).sum()) for omega, centre in terms for n in now)


@pytest.mark.parametrize(("name", "options"), READINGS)
def test_the_loss_is_its_formula(begin, shift_labels, arithmetic, name, options):
    shift_labels()
    begun = begin(name, "--lambda", "0.7", *options)
    batch, task = begun.batch(), begun.task
    losses = begun.method.loss(begun.model, batch)

    labels = batch.labels.numpy()
    forgotten = np.isin(labels, task.forget)
    assert forgotten.any() and not forgotten.all()
    taught = np.where(forgotten, (labels + 1) % 6, labels)
    relabelled = arithmetic.cross_entropy(arithmetic.logits(begun.model, batch.images), taught)
    omega = importance(name, options, begun.before, begun.images, task.remain_indices)
    moved = quadratic([(omega, backbone_weights(begun.before))], backbone_weights(begun.model))
    assert moved > 0
    assert set(losses) == {"total", "relabelled", "penalty"}
    assert losses["relabelled"].item() == pytest.approx(relabelled, rel=1e-9)
    assert losses["penalty"].item() == pytest.approx(moved, rel=1e-6)
    assert losses["total"].item() == pytest.approx(relabelled + 0.7 * moved, rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_smaller_last_batch_of_the_importance_counts_as_published(begin, name):
    """Ω is the mean over batches; EWC's are weighted by their sizes."""
    options = {"ewc": ("--fisher", "batch"), "mas": ("--importance", "batch")}.get(name, ())
    begun = begin(name, *options, "--batch-size", "6")
    assert len(begun.task.remain_indices) % 6
    omega = importance(name, options, begun.before, begun.images, begun.task.remain_indices, batch_size=6)
    moved = quadratic([(omega, backbone_weights(begun.before))], backbone_weights(begun.model))
    assert begun.method.penalty(begun.model).item() == pytest.approx(moved, rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_one_stream_shows_each_image_of_both_kinds_once(begin, name):
    begun = begin(name)
    (plan,) = begun.method.passes(begun.method.task, 0, begun.method.epochs)
    (stream,) = plan.streams.values()
    seen = torch.cat([begun.task.forget_indices, begun.task.remain_indices])
    assert sorted(stream.tolist()) == sorted(seen.tolist())


@pytest.mark.parametrize(("name", "options"), READINGS)
def test_the_penalty_over_three_tasks(begin, move_weights, name, options):
    begun = begin(name, *options, tasks=3, moved=False)
    method, model, images = begun.method, begun.model, begun.images
    terms = []
    for task in begun.tasks:
        if task.number > 1:
            method.end_task(model)
            torch.manual_seed(11)
            method.begin_task(model, task, images, method.args.epochs)
        omega = importance(name, options, model, images, task.remain_indices)
        terms = [*([] if name == "l2" else terms), (omega, backbone_weights(model))]
        assert method.penalty(model).item() == pytest.approx(quadratic(terms, backbone_weights(model)), rel=1e-6, abs=1e-12)
        move_weights(model, seed=task.number)
        expected = quadratic(terms, backbone_weights(model))
        assert method.penalty(model).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["ewc", "mas"])
def test_the_gradient_of_the_penalty_over_two_tasks(begin, move_weights, name):
    begun = begin(name)
    method, model = begun.method, begun.model
    first = importance(name, (), begun.before, begun.images, begun.tasks[0].remain_indices), backbone_weights(begun.before)
    method.end_task(model)
    method.begin_task(model, begun.tasks[1], begun.images, method.args.epochs)
    second = importance(name, (), model, begun.images, begun.tasks[1].remain_indices), backbone_weights(model)
    move_weights(model, seed=8)
    method.penalty(model).backward()
    for n, theta in backbone_weights(model).items():
        expected = sum(2 * omega[n] * (theta - centre[n]) for omega, centre in (first, second))
        np.testing.assert_allclose(model.get_parameter(n).grad.numpy(), expected, rtol=1e-6, atol=1e-9)


def autograds(method, model) -> torch.Tensor:
    """The penalty as autograd sees it."""
    weighted = [method.roots[n] * (p - method.centre[n]) for n, p in model.trained().items()]
    return torch.stack([part.norm() for part in weighted]).square().sum()


def nodes_of(function, seen: set) -> set:
    """The autograd nodes of a backward pass but for the parameters' own."""
    if function is not None and function not in seen and function.name() != "torch::autograd::AccumulateGrad":
        seen.add(function)
        for other, _ in function.next_functions:
            nodes_of(other, seen)
    return seen


def test_the_gradient_of_the_penalty_is_autograds_in_one_step(begin):
    begun = begin("ewc")
    method, model = begun.method, begun.model
    parameters = [*model.trained().values()]
    own, plain = method.penalty(model), autograds(method, model)
    assert own.item() == pytest.approx(plain.item(), rel=1e-12)
    gradients, expected = (torch.autograd.grad(0.7 * value, parameters) for value in (own, plain))
    for found, right in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(found.numpy(), right.numpy(), rtol=1e-12, atol=0)
    # A long step along the gradient, by central differences of a quadratic: exact but for rounding.
    values = []
    for step in (1e-3, -2e-3):
        with torch.no_grad():
            torch._foreach_add_(parameters, gradients, alpha=step)
            values.append(method.penalty(model).item())
    slope = 0.7 * (values[0] - values[1]) / 2e-3
    assert slope == pytest.approx(sum(g.square().sum().item() for g in gradients), rel=1e-8)
    assert len(nodes_of(method.penalty(model).grad_fn, set())) < 5 < len(nodes_of(plain.grad_fn, set()))


def test_training_with_the_penalty_ends_where_autograd_would(begin, monkeypatch):
    ends = []
    for penalty in (QuadraticPenalty.penalty, lambda method, model: autograds(method, model)):
        monkeypatch.setattr(QuadraticPenalty, "penalty", penalty)
        begun = begin("mas", "--lambda", "0.1", moved=False)
        optimizer = torch.optim.AdamW([p for p in begun.model.parameters() if p.requires_grad], lr=1e-3)
        batch = begun.batch()
        for _ in range(5):
            begun.method.loss(begun.model, batch)["total"].backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(torch.cat([p.detach().flatten() for p in begun.model.parameters()]))
    assert not torch.equal(ends[0], torch.cat([p.flatten() for p in begun.before.parameters()]))
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["ewc", "mas"])
def test_a_parameter_that_matters_to_no_task_costs_nothing(begin, move_weights, name):
    """0/0 in the centre of two terms without weight must not become a NaN."""
    begun = begin(name, moved=False)
    for tensor in begun.method.importance.values():
        tensor.zero_()
    begun.method.begin_task(begun.model, begun.tasks[1], begun.images, begun.method.args.epochs)
    for tensor in begun.method.roots.values():
        tensor.zero_()
    move_weights(begun.model)
    value = begun.method.penalty(begun.model)
    value.backward()
    assert value.item() == 0
    assert not any(p.grad.any() for n, p in begun.model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["ewc", "mas"])
@pytest.mark.parametrize("finished", [1, 2])
def test_a_finished_tasks_state_gives_a_resumed_run_the_same_penalty(
    begin, method_arguments, move_weights, cpu, name, finished
):
    begun = begin(name, tasks=3)
    uninterrupted, model = begun.method, begun.model
    if finished == 2:
        uninterrupted.end_task(model)
        uninterrupted.begin_task(model, begun.tasks[1], begun.images, uninterrupted.args.epochs)
        move_weights(model, seed=7)
    uninterrupted.end_task(model)
    buffer = io.BytesIO()
    torch.save(uninterrupted.state_dict(), buffer)
    buffer.seek(0)
    resumed = METHODS[name](method_arguments(name), cpu)
    resumed.begin_run(begun.before, begun.tasks, begun.images)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    for method in (uninterrupted, resumed):
        method.begin_task(model, begun.tasks[finished], begun.images, method.args.epochs)
    move_weights(model, seed=8)
    assert resumed.penalty(model).item() == uninterrupted.penalty(model).item()
    fresh = METHODS[name](method_arguments(name), cpu)
    fresh.begin_task(model, begun.tasks[finished], begun.images, fresh.args.epochs)
    assert fresh.penalty(model).item() != pytest.approx(uninterrupted.penalty(model).item(), rel=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_the_centre_and_the_importance_do_not_train(begin, name):
    begun = begin(name)
    kept = {n: (begun.method.importance[n].clone(), begun.method.centre[n].clone()) for n in begun.method.importance}
    optimizer = torch.optim.SGD([p for p in begun.model.parameters() if p.requires_grad], lr=0.01)
    begun.method.loss(begun.model, begun.batch())["total"].backward()
    optimizer.step()
    for n, (omega, centre) in kept.items():
        assert torch.equal(begun.method.importance[n], omega)
        assert torch.equal(begun.method.centre[n], centre)
