"""Every head against scalar arithmetic written from the papers' formulas."""

import math

import numpy as np
import pytest
import torch

from backbone.heads import HEADS, ArcFace, CosFace

CLASSES, DIM = 6, 5
LABELS = torch.arange(CLASSES)


def make(name: str) -> torch.nn.Module:
    torch.manual_seed(7)
    head = HEADS[name](DIM, CLASSES).double()
    if name == "softmax":
        torch.nn.init.normal_(head.bias)
    return head


def embeddings_for(head: torch.nn.Module) -> torch.Tensor:
    """One embedding per label: along, against, close to and far from the label's weight."""
    torch.manual_seed(8)
    embeddings = torch.randn(CLASSES, DIM, dtype=torch.float64)
    embeddings[0] = 3 * head.weight[0].detach()
    embeddings[1] = -0.5 * head.weight[1].detach()
    embeddings[2] = -head.weight[2].detach() + 0.05 * embeddings[2]
    embeddings[3] = head.weight[3].detach() + 0.05 * embeddings[3]
    return embeddings


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    value = float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))
    return max(-1.0, min(1.0, value))


def expected_logit(name: str, head: torch.nn.Module, e: np.ndarray, c: int, label: int | None) -> float:
    w = head.weight[c].detach().numpy()
    if name == "softmax":
        return float(w @ e) + head.bias[c].item()
    cos = cosine(e, w)
    if name == "cosface" and c == label:
        return 64 * (cos - 0.35)
    if name == "arcface" and c == label:
        theta = math.acos(cos)
        return 64 * (math.cos(theta + 0.5) if theta + 0.5 <= math.pi else cos - 0.5 * math.sin(math.pi - 0.5))
    return 64 * cos


def expected_loss(name: str, head: torch.nn.Module, e: np.ndarray, label: int) -> float:
    if name == "sface":
        total = 0.0
        for c in range(CLASSES):
            cos = cosine(e, head.weight[c].detach().numpy())
            theta = math.acos(cos)
            if c == label:
                total -= 64 * cos / (1 + math.exp(-80 * (theta - 0.80)))
            else:
                total += 64 * cos / (1 + math.exp(80 * (theta - 1.22)))
        return total
    logits = [expected_logit(name, head, e, c, label) for c in range(CLASSES)]
    return max(logits) + math.log(sum(math.exp(x - max(logits)) for x in logits)) - logits[label]


@pytest.mark.parametrize("name", HEADS)
def test_logits_for_every_label_and_without(name):
    head = make(name)
    embeddings = embeddings_for(head)
    for labels in (None, LABELS, LABELS.flip(0)):
        each_label = [None] * CLASSES if labels is None else labels.tolist()
        expected = [
            [expected_logit(name, head, e.numpy(), c, label) for c in range(CLASSES)]
            for e, label in zip(embeddings, each_label, strict=True)
        ]
        found = head(embeddings) if labels is None else head.add_margin(head(embeddings), labels)
        np.testing.assert_allclose(found.detach().numpy(), expected, atol=2e-4)


def test_arcface_reaches_beyond_pi_in_these_tests():
    head = make("arcface")
    cos = head(embeddings_for(head)).diagonal() / 64
    assert (cos < math.cos(math.pi - 0.5)).sum() == 2


@pytest.mark.parametrize("name", HEADS)
def test_the_loss_is_the_mean_over_the_batch(name):
    head = make(name)
    embeddings = embeddings_for(head)
    expected = np.array([expected_loss(name, head, e.numpy(), i) for i, e in enumerate(embeddings)])
    each = [head.loss(embeddings[[i]], LABELS[[i]]).item() for i in range(CLASSES)]
    np.testing.assert_allclose(each, expected, rtol=1e-6, atol=2e-4)
    np.testing.assert_allclose(head.loss(embeddings, LABELS).item(), expected.mean(), rtol=1e-5)
    from_logits = head.loss_of_logits(head(embeddings), LABELS)
    torch.testing.assert_close(from_logits, head.loss(embeddings, LABELS), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["softmax", "cosface", "arcface"])
def test_gradient_against_finite_differences(name):
    head = make(name)
    embeddings = embeddings_for(head)[2:].requires_grad_()
    assert torch.autograd.gradcheck(lambda e: head.add_margin(head(e), LABELS[2:]), embeddings, atol=1e-4)


def test_sface_gradient_treats_its_weights_as_constants():
    head = make("sface")
    embeddings = embeddings_for(head).requires_grad_()
    (gradient,) = torch.autograd.grad(CLASSES * head.loss(embeddings, LABELS), embeddings)
    expected = torch.zeros_like(embeddings)
    for i in range(CLASSES):
        for c in range(CLASSES):
            e, w = embeddings[i].detach(), head.weight[c].detach()
            cos = cosine(e.numpy(), w.numpy())
            theta = math.acos(cos)
            r = -1 / (1 + math.exp(-80 * (theta - 0.80))) if c == i else 1 / (1 + math.exp(80 * (theta - 1.22)))
            expected[i] += r * 64 * (w / w.norm() - cos * e / e.norm()) / e.norm()
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["cosface", "arcface", "sface"])
@pytest.mark.parametrize("sign", [1, -1])
def test_float32_gradient_is_finite_and_small_where_the_cosine_is_one(name, sign):
    torch.manual_seed(0)
    head = HEADS[name](64, CLASSES)
    for scale in (1.0, 0.37, 1e3):
        embeddings = (sign * scale * head.weight.detach()).requires_grad_()
        head.zero_grad()
        head.loss(embeddings, LABELS).backward()
        assert embeddings.grad.isfinite().all() and head.weight.grad.isfinite().all()
        assert (embeddings.grad.norm(dim=1) * embeddings.norm(dim=1)).max() < 100


def test_arcface_gradient_at_exactly_one():
    head = ArcFace(2, 2)
    logits = torch.tensor([[64.0, 0.0], [0.0, -64.0], [64.1, 0.0]], requires_grad=True)
    with_margin = head.add_margin(logits, torch.tensor([0, 1, 0]))
    with_margin.sum().backward()
    assert with_margin[0, 0].item() == pytest.approx(64 * math.cos(0.5), abs=1e-3)
    torch.testing.assert_close(
        logits.grad, torch.tensor([[math.cos(0.5), 1.0], [1.0, 1.0], [math.cos(0.5), 1.0]]), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("name", HEADS)
def test_logits_are_float32_under_autocast(name):
    head = make(name).float()
    embeddings = embeddings_for(head).float()
    plain = head(embeddings)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(head(embeddings), plain)
        assert head(embeddings.bfloat16()).dtype == torch.float32
    for dtype in (torch.bfloat16, torch.float16):
        assert head.to(dtype)(embeddings.to(dtype)).dtype == torch.float32


@pytest.mark.parametrize("name", HEADS)
def test_weights_are_xavier_uniform(name):
    head = HEADS[name](200, 100)
    bound = math.sqrt(6 / 300)
    assert head.weight.shape == (100, 200)
    assert 0.99 * bound < head.weight.abs().max() <= bound
    assert head.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    assert [key for key, _ in head.named_parameters()] == (["weight", "bias"] if name == "softmax" else ["weight"])


def test_scale_and_margin_are_options():
    head = CosFace(4, 3, scale=10.0, margin=0.1)
    logits = head(torch.randn(3, 4))
    torch.testing.assert_close((logits - head.add_margin(logits, torch.arange(3))).diagonal(), torch.ones(3))


@pytest.mark.parametrize("name", HEADS)
def test_a_class_without_a_row_is_never_the_answer(name):
    """Also of a face that is unlike all others, whose logits are below the 0 that a zero row gives."""
    head, kept = make(name), [1, 2, 4, 5]
    with torch.no_grad():
        if name == "softmax":
            head.bias.fill_(-1)
        for rows in head.parameters():
            rows[[0, 3]] = 0
    embeddings = (-torch.linalg.pinv(head.weight.detach()[kept]).sum(dim=1)[None]).requires_grad_()
    logits = head(embeddings)
    assert logits[0, kept].max() < 0
    assert logits.argmax() not in (0, 3)
    head.loss(embeddings, torch.tensor([1])).backward()
    assert embeddings.grad.isfinite().all() and head.weight.grad.isfinite().all()
    assert not head.weight.grad[[0, 3]].any()
