import copy

import numpy as np
import pytest
import torch

LOWER = ("backbone.cls_token", "backbone.pos_embed", "backbone.patch_embed.", "backbone.blocks.0.")


def mid_tokens(model, images: torch.Tensor) -> np.ndarray:
    """What leaves the first block while the model embeds."""
    seen = []
    handle = model.backbone.blocks[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    model.embed(images)
    handle.remove()
    (tokens,) = seen
    return tokens.detach().double().numpy()


def attention_maps(model, images: torch.Tensor) -> np.ndarray:
    maps = (mid_tokens(model, images) ** 2).mean(axis=2)
    return maps / np.linalg.norm(maps, axis=1, keepdims=True)


def with_lower_half(model, tensors: dict[str, torch.Tensor]):
    """A copy of a model with another lower half."""
    other = copy.deepcopy(model)
    for name, tensor in tensors.items():
        other.backbone.get_parameter(name).data.copy_(tensor)
    return other


@pytest.fixture
def without_deposit():
    def without_deposit(model):
        plain = copy.deepcopy(model)
        del plain.deposit
        return plain

    return without_deposit


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("kd_columns", ["classes", "slices"])
def test_the_loss_is_its_formula(begin, shift_labels, arithmetic, without_deposit, kd_columns, number):
    shift_labels()
    weights = {"attention": 30.0, "kd": 7.0, "deposit": 0.3, "replay": 2.0}
    options = [text for name, value in weights.items() for text in (f"--{name}-weight", str(value))]
    options += ["--temperature", "5", "--kd-share", "0.2", "--kd-columns", kd_columns]
    begun = begin("lirf", *options, number=number)
    task, batch = begun.task, begun.batch()
    losses = begun.method.loss(begun.model, batch)

    images, labels = batch.split(batch.images), batch.split(batch.labels)
    plain = without_deposit(begun.model)
    student = {name: arithmetic.logits(plain, images[name]) for name in ("forget", "remain")}
    teacher = arithmetic.logits(begun.before, images["forget"])
    deposited = arithmetic.logits(with_lower_half(plain, begun.model.deposit.state_dict()), images["forget"])
    if kd_columns == "classes":
        remaining, forgotten = list(task.remain), list(task.forget)
        assert forgotten != list(range(len(forgotten)))
    else:
        k = len(task.forget)
        remaining, forgotten = list(range(k, 6)), list(range(k))

    forget = arithmetic.cross_entropy(student["forget"], (labels["forget"].numpy() + 1) % 6)
    kd = arithmetic.kl(teacher[:, remaining], student["forget"][:, remaining], 5.0)
    attention = ((attention_maps(plain, images["forget"]) - attention_maps(begun.before, images["forget"])) ** 2).mean()
    replay = arithmetic.cross_entropy(student["remain"], labels["remain"])
    deposit = 0.2 * arithmetic.kl(teacher[:, forgotten], deposited[:, forgotten], 5.0)
    deposit += 0.8 * arithmetic.cross_entropy(deposited, labels["forget"])
    total = 0.8 * forget + 7 * 0.2 * kd - 30 * attention + 2 * replay + 0.3 * deposit
    assert kd > 0.01 and attention > 1e-5
    assert set(losses) == {"total", "forget", "kd", "attention", "replay", "deposit"}
    assert losses["forget"].item() == pytest.approx(forget, rel=1e-9)
    assert losses["kd"].item() == pytest.approx(kd, rel=1e-4)
    assert losses["attention"].item() == pytest.approx(attention, rel=1e-4)
    assert losses["replay"].item() == pytest.approx(replay, rel=1e-9)
    assert losses["deposit"].item() == pytest.approx(deposit, rel=1e-4)
    assert losses["total"].item() == pytest.approx(total, rel=1e-4)


def test_the_lower_half_and_the_deposit_train_and_nothing_else(begin):
    begun = begin("lirf")
    names = {name for name, _ in begun.model.named_parameters()}
    lower = {name for name in names if name.startswith(LOWER)}
    deposit = {name for name in names if name.startswith("deposit.")}
    assert {name.removeprefix("deposit.") for name in deposit} == {name.removeprefix("backbone.") for name in lower}
    assert {name for name, p in begun.model.named_parameters() if p.requires_grad} == lower | deposit
    begun.method.loss(begun.model, begun.batch())["total"].backward()
    assert {name for name, p in begun.model.named_parameters() if p.grad is not None} == lower | deposit
    assert all(p.grad.any() for p in begun.model.parameters() if p.requires_grad)


def test_student_and_deposit_train_apart(begin):
    begun = begin("lirf")
    losses = begun.method.loss(begun.model, begun.batch())
    losses["deposit"].backward(retain_graph=True)
    assert {name.split(".")[0] for name, p in begun.model.named_parameters() if p.grad is not None} == {"deposit"}
    begun.model.zero_grad()
    sum(losses[part] for part in ("forget", "kd", "attention", "replay")).backward()
    assert {name.split(".")[0] for name, p in begun.model.named_parameters() if p.grad is not None} == {"backbone"}


def test_the_deposit_starts_as_the_teachers_lower_half(begin, arithmetic):
    begun = begin("lirf", moved=False)
    for name, tensor in begun.model.deposit.state_dict().items():
        assert torch.equal(tensor, begun.before.backbone.get_parameter(name))
    stored = {p.data_ptr() for p in begun.model.backbone.parameters()}
    assert not stored & {p.data_ptr() for p in begun.model.deposit.parameters()}


def test_the_task_leaves_the_deposit_beside_the_model(begin):
    begun = begin("lirf")
    names = set(begun.before.state_dict())
    deposit = {name: tensor.clone() for name, tensor in begun.model.deposit.state_dict().items()}
    left = begun.method.end_task(begun.model)
    assert not hasattr(begun.model, "deposit")
    assert set(begun.model.state_dict()) == names
    assert left.files["deposits"].keys() == deposit.keys()
    assert all(torch.equal(left.files["deposits"][name], tensor) for name, tensor in deposit.items())
    assert all(torch.equal(p, q) for p, q in zip(upper(begun.model), upper(begun.before), strict=True))


def upper(model) -> list[torch.Tensor]:
    return [p for name, p in model.named_parameters() if not name.startswith(LOWER)]


def test_the_next_task_has_its_own_deposit(begin):
    begun = begin("lirf")
    begun.method.end_task(begun.model)
    begun.method.begin_task(begun.model, begun.tasks[1], begun.images, begun.method.args.epochs)
    for name, tensor in begun.model.deposit.state_dict().items():
        assert torch.equal(tensor, begun.model.backbone.get_parameter(name))
        assert not torch.equal(tensor, begun.before.backbone.get_parameter(name))
    begun.method.loss(begun.model, begun.batch())["total"].backward()


def test_the_totals_gradient_moves_the_student_away_from_the_teachers_attention(begin):
    begun = begin("lirf")
    losses = begun.method.loss(begun.model, begun.batch())
    trained = [p for name, p in begun.model.named_parameters() if p.requires_grad and name.startswith("backbone.")]
    shares = {"forget": 0.9, "kd": 10 * 0.1, "attention": -300.0, "replay": 5.0}
    gradients = {part: torch.autograd.grad(losses[part], trained, retain_graph=True) for part in shares}
    assert any(g.any() for g in gradients["attention"])
    for i, total in enumerate(torch.autograd.grad(losses["total"], trained)):
        expected = sum(share * gradients[part][i] for part, share in shares.items())
        torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-6)


def test_the_frozen_half_drops_nothing_out(begin):
    """Student and deposit train with dropout, the teacher's upper half answers as it is."""
    begun = begin("lirf", proj_drop_rate=0.5)
    begun.model.train()
    begun.method.begin_epoch(begun.model, 0)
    blocks, deposit = begun.model.backbone.blocks, begun.model.deposit.blocks
    assert blocks[0].mlp.drop1.training and deposit[0].mlp.drop1.training
    assert not blocks[1].training and not blocks[1].mlp.drop1.training
    tokens = torch.randn(3, 17, begun.model.backbone.embed_dim, dtype=torch.float64)
    images = torch.zeros(3, 3, 16, 16, dtype=torch.float64)
    first, second = (begun.method.halves.upper(begun.model.backbone, images, tokens) for _ in range(2))
    assert torch.equal(first, second)
