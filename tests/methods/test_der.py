"""DER and DER++."""

import pytest
import torch


@pytest.mark.parametrize("distill_on", ["logits", "embeddings"])
@pytest.mark.parametrize("name", ["der", "der_pp"])
def test_the_loss_is_its_formula(begin, shift_labels, arithmetic, name, distill_on):
    shift_labels()
    replayed = ("--lambda-replay", "0.3") if name == "der_pp" else ()
    begun = begin(name, "--lambda", "0.02", "--distill-on", distill_on, *replayed)
    batch = begun.batch()
    losses = begun.method.loss(begun.model, batch)

    images, labels = batch.split(batch.images), batch.split(batch.labels)
    logits = {stream: arithmetic.logits(begun.model, part) for stream, part in images.items()}
    forget = arithmetic.cross_entropy(logits["forget"], (labels["forget"].numpy() + 1) % 6)
    if distill_on == "logits":
        matched = ((logits["remain"] - arithmetic.logits(begun.before, images["remain"])) ** 2).sum(axis=1).mean()
    else:
        student, teacher = (arithmetic.embeddings(model, images["remain"]) for model in (begun.model, begun.before))
        matched = ((student - teacher) ** 2).sum()
    total = forget + 0.02 * matched
    assert matched > 0.1
    assert losses["forget"].item() == pytest.approx(forget, rel=1e-9)
    assert losses["matched"].item() == pytest.approx(matched, rel=1e-5)
    if name == "der_pp":
        replay = arithmetic.cross_entropy(logits["replay"], labels["replay"])
        total += 0.3 * replay
        assert losses["replay"].item() == pytest.approx(replay, rel=1e-9)
    assert set(losses) == {"total", "forget", "matched"} | ({"replay"} if name == "der_pp" else set())
    assert losses["total"].item() == pytest.approx(total, rel=1e-5)


def test_the_replayed_batch_is_drawn_independently(begin):
    begun = begin("der_pp")
    (plan,) = begun.method.passes(begun.method.task, 0, begun.method.epochs)
    assert list(plan.streams) == ["forget", "remain", "replay"]
    assert torch.equal(plan.streams["remain"], plan.streams["replay"])
    indices = begun.batch().split(begun.batch().indices)
    assert set(indices["replay"].tolist()) != set(indices["remain"].tolist())
    assert len(indices["replay"]) == len(indices["remain"])


def test_der_has_no_replay(begin):
    begun = begin("der")
    (plan,) = begun.method.passes(begun.task, 0, 1)
    assert list(plan.streams) == ["forget", "remain"]
