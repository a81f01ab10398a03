import copy

import numpy as np
import pytest
import torch

from methods.distillation import Teacher, kl_divergence

WITH_TEACHER = ["lwf", "der", "der_pp", "fdr", "scrub", "scrub_s", "lirf"]


def two_logits(rows: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return tuple(3 * torch.randn(rows, 7, generator=generator) for _ in range(2))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 10.0])
def test_the_divergence_is_its_formula(arithmetic, temperature):
    p, q = two_logits()
    expected = arithmetic.kl(arithmetic.array(p), arithmetic.array(q), temperature)
    assert kl_divergence(p, q, temperature).item() == pytest.approx(expected, rel=1e-5)


def test_the_temperature_is_one_unless_told(arithmetic):
    p, q = two_logits()
    assert kl_divergence(p, q).item() == pytest.approx(arithmetic.kl(p.double().numpy(), q.double().numpy()), rel=1e-5)


def test_equal_outputs_have_no_divergence_and_the_teacher_comes_first(arithmetic):
    p, _ = two_logits()
    assert kl_divergence(p, p, 2.0).item() == 0
    sure, unsure = torch.tensor([[5.0, 0.0, 0.0]]), torch.zeros(1, 3)
    assert kl_divergence(sure, unsure).item() == pytest.approx(arithmetic.kl(sure.numpy(), unsure.numpy()), rel=1e-5)
    assert kl_divergence(unsure, sure).item() == pytest.approx(arithmetic.kl(unsure.numpy(), sure.numpy()), rel=1e-5)
    assert kl_divergence(unsure, sure).item() > 2 * kl_divergence(sure, unsure).item()


def test_the_divergence_is_a_mean_over_the_batch():
    p, q = two_logits()
    twice = kl_divergence(torch.cat([p, p]), torch.cat([q, q]), 2.0)
    assert twice.item() == pytest.approx(kl_divergence(p, q, 2.0).item(), rel=1e-6)


def test_the_temperature_keeps_the_gradients_size():
    p, q = two_logits()
    sizes = []
    for temperature in (50.0, 100.0):
        student = q.clone().requires_grad_(True)
        kl_divergence(p, student, temperature).backward()
        sizes.append(student.grad.norm().item())
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)


def test_a_teacher_answers_by_position_in_any_order(make_recognizer, make_images, cpu, arithmetic):
    images, model = make_images(), make_recognizer(dtype=torch.float64).eval()
    indices = torch.tensor([40, 3, 17, 8, 22, 5])
    teacher = Teacher(model, images, indices, cpu)
    asked = torch.tensor([8, 40, 8, 5])
    embeddings = arithmetic.embeddings(model, images.images[asked])
    np.testing.assert_allclose(teacher.embeddings(asked).numpy(), embeddings, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(teacher.logits(asked).numpy(), arithmetic.logits_of(model, embeddings), rtol=1e-5, atol=1e-4)


def test_a_teacher_drops_nothing_out_and_leaves_the_models_mode(make_recognizer, make_images, cpu):
    images, model = make_images(), make_recognizer(dtype=torch.float64, pos_drop_rate=0.5, proj_drop_rate=0.5).train()
    indices = torch.arange(10)
    teacher = Teacher(model, images, indices, cpu)
    assert model.training and model.backbone.training
    with torch.no_grad():
        expected = copy.deepcopy(model).eval().embed(images.images[:10])
    torch.testing.assert_close(teacher.embeddings(indices).double(), expected, rtol=1e-5, atol=1e-6)


def shown_to(begun) -> torch.Tensor:
    """The images that a method's teacher is asked about, shuffled."""
    task, name = begun.task, begun.method.name
    parts = {"lirf": [task.forget_indices], "scrub": [task.forget_indices, task.remain_indices]}
    indices = torch.cat(parts.get(name.removesuffix("_s"), [task.remain_indices]))
    return indices[torch.randperm(len(indices), generator=torch.Generator().manual_seed(6))]


@pytest.mark.parametrize("name", WITH_TEACHER)
def test_the_teacher_stays_the_model_that_entered_the_task(begin, arithmetic, name):
    begun = begin(name, "--temperature", "2") if name in ("lwf", "scrub", "scrub_s") else begin(name)
    method, model, asked = begun.method, begun.model, shown_to(begun)

    def outputs() -> list[torch.Tensor]:
        own = [method.teacher.embeddings(asked), method.teacher.logits(asked)]
        return [each.clone() for each in own + ([method.teacher_maps] if name == "lirf" else [])]

    start, answers = outputs(), arithmetic.logits(model, begun.images.images[asked])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    passes = len(method.passes(method.task, 0, method.epochs))
    for step in range(3):
        optimizer.zero_grad()
        method.loss(model, begun.batch(pass_number=step % passes))["total"].backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    assert np.abs(arithmetic.logits(model, begun.images.images[asked]) - answers).max() > 0.1
    assert all(torch.equal(now, then) for now, then in zip(outputs(), start, strict=True))

    with torch.no_grad():
        expected = begun.before.embed(begun.images.images[asked])
    np.testing.assert_allclose(start[0].double().numpy(), expected.numpy(), rtol=1e-5, atol=1e-6)
    logits = arithmetic.logits_of(begun.before, expected.numpy())
    np.testing.assert_allclose(start[1].double().numpy(), logits, rtol=1e-5, atol=1e-4)
