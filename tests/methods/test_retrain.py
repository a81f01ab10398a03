import pytest
import torch


def test_the_loss_is_the_cross_entropy_of_what_remains(begin, arithmetic):
    begun = begin("retrain")
    batch = begun.batch()
    assert set(batch.labels.tolist()) <= set(begun.task.remain)
    losses = begun.method.loss(begun.model, batch)
    assert list(losses) == ["total"]
    expected = arithmetic.cross_entropy(arithmetic.logits(begun.model, batch.images), batch.labels)
    assert losses["total"].item() == pytest.approx(expected, rel=1e-9)


def test_each_pass_of_an_epoch_shows_each_remaining_image_once(begin):
    begun = begin("retrain", "--passes", "3")
    plan, *others = begun.method.passes(begun.method.task, 0, begun.method.epochs)
    assert others == [plan, plan]
    (stream,) = plan.streams.values()
    assert sorted(stream.tolist()) == sorted(begun.task.remain_indices.tolist())


def test_everything_trains_the_head_too(begin):
    begun = begin("retrain")
    begun.method.loss(begun.model, begun.batch())["total"].backward()
    assert all(p.requires_grad and p.grad is not None for p in begun.model.parameters())


@pytest.mark.parametrize("number", [1, 2])
def test_it_starts_from_weights_unlike_those_that_entered_the_task(begin, number):
    begun = begin("retrain", number=number, moved=False)
    for (name, new), old in zip(begun.model.named_parameters(), begun.before.parameters(), strict=True):
        if new.ndim > 1 and new.numel() > 1:
            cosine = torch.nn.functional.cosine_similarity(new.flatten(), old.flatten(), dim=0)
            assert abs(cosine) < 0.5, name


def test_the_weights_it_starts_from_follow_the_seed(begin):
    first, second = begin("retrain", moved=False), begin("retrain", moved=False)
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))
    first.method.begin_task(first.model, first.tasks[1], first.images, first.method.args.epochs)
    assert not torch.equal(first.model.head.weight, second.model.head.weight)
