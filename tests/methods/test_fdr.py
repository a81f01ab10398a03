import numpy as np
import pytest


@pytest.mark.parametrize("distill_on", ["probabilities", "logits"])
def test_the_loss_is_its_formula(begin, shift_labels, arithmetic, distill_on):
    shift_labels()
    begun = begin("fdr", "--lambda", "4", "--distill-on", distill_on)
    batch = begun.batch()
    losses = begun.method.loss(begun.model, batch)

    images, labels = batch.split(batch.images), batch.split(batch.labels)
    forget = arithmetic.cross_entropy(arithmetic.logits(begun.model, images["forget"]), (labels["forget"].numpy() + 1) % 6)
    outputs = [arithmetic.logits(model, images["remain"]) for model in (begun.model, begun.before)]
    if distill_on == "probabilities":
        outputs = [arithmetic.softmax(each) for each in outputs]
    distance = np.sqrt(((outputs[0] - outputs[1]) ** 2).sum(axis=1)).mean()
    assert distance > 0.01
    assert set(losses) == {"total", "forget", "distance"}
    assert losses["forget"].item() == pytest.approx(forget, rel=1e-9)
    assert losses["distance"].item() == pytest.approx(distance, rel=1e-5)
    assert losses["total"].item() == pytest.approx(forget + 4 * distance, rel=1e-5)


@pytest.mark.parametrize("distill_on", ["probabilities", "logits"])
def test_the_first_step_has_a_finite_gradient(begin, distill_on):
    """The student still equals the teacher: a norm has no derivative at zero."""
    begun = begin("fdr", "--distill-on", distill_on, moved=False)
    begun.method.loss(begun.model, begun.batch())["total"].backward()
    assert all(p.grad.isfinite().all() for p in begun.model.parameters() if p.requires_grad)


def test_with_margins_on_both_sides_the_logits_are_as_far_apart(begin, arithmetic):
    """Why --distill-on logits may leave the published margins out."""
    begun = begin("fdr")
    batch = begun.batch()
    logits = [arithmetic.logits(model, batch.images) for model in (begun.model, begun.before)]
    training = [arithmetic.with_margin(each, batch.labels) for each in logits]
    np.testing.assert_allclose(training[0] - training[1], logits[0] - logits[1], atol=1e-12)
