"""Pre-training without some classes: their rows have no part in the loss."""

from types import SimpleNamespace

import pytest
import torch

from backbone.heads import HEADS
from data.tasks import pretraining_task
from methods import pretrain
from tests.methods.conftest import first_batch

ABSENT = [4, 1]
PRESENT = [0, 2, 3, 5]


@pytest.fixture
def begun(make_recognizer, make_images, cpu, monkeypatch):
    """begun(without, **options) → method, model and first batch; images are not mirrored."""
    monkeypatch.setattr(pretrain, "random_flip", lambda images: images)

    def begun(without, **options):
        images, model = make_images(), make_recognizer(**options).eval()
        method = pretrain.Pretrain(SimpleNamespace(batch_size=8, last_batch="full", mirror="on"), cpu)
        method.begin_task(model, pretraining_task(images.labels, 6, without), images, 1)
        return method, model, first_batch(method, images)

    return begun


def test_the_task_keeps_class_ids_and_leaves_their_images_out():
    labels = torch.tensor([3, 1, 0, 2, 1, 4, 0])
    task = pretraining_task(labels, 5, [4, 1, 4])
    assert (task.remain, task.old, task.forget, task.missing) == ((0, 2, 3), (1, 4), (), ())
    assert task.remain_indices.tolist() == [0, 2, 3, 6]
    assert pretraining_task(labels, 5).remain_indices.tolist() == [*range(7)]


def test_the_loss_is_cross_entropy_over_the_classes_that_are_there(begun, arithmetic):
    method, model, batch = begun(ABSENT)
    logits = arithmetic.logits(model, batch.images)[:, PRESENT]
    expected = arithmetic.cross_entropy(logits, [PRESENT.index(label) for label in batch.labels])
    assert method.loss(model, batch)["total"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("head", HEADS)
def test_absent_rows_change_no_loss_and_get_no_gradient(begun, head):
    method, model, batch = begun(ABSENT, head=head)
    loss = method.loss(model, batch)["total"]
    loss.backward()
    for parameter in model.head.parameters():
        assert not parameter.grad[ABSENT].any()
        assert parameter.grad[PRESENT].any()
        parameter.data[ABSENT] = torch.randn_like(parameter.data[ABSENT])
    assert torch.equal(method.loss(model, batch)["total"], loss)


@pytest.mark.parametrize("head", HEADS)
def test_with_every_class_the_loss_and_the_rows_are_what_they_were(begun, head):
    method, model, batch = begun([], head=head)
    loss = method.loss(model, batch)["total"]
    assert torch.equal(loss, model.head.loss(model.embed(batch.images), batch.labels))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    method.end_task(model)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("head", HEADS)
def test_in_the_end_absent_rows_are_zero_and_never_win(begun, head):
    method, model, batch = begun(ABSENT, head=head)
    weight = model.head.weight.detach().clone()
    method.end_task(model)
    assert not model.head.weight[ABSENT].any()
    assert torch.equal(model.head.weight[PRESENT], weight[PRESENT])
    with torch.no_grad():
        winners = model(batch.images).argmax(dim=1)
    assert torch.isin(winners, torch.tensor(PRESENT)).all()
