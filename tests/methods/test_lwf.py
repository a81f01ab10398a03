import pytest


@pytest.mark.parametrize("temperature", [2.0, 5.0])
def test_the_loss_is_its_formula(begin, shift_labels, arithmetic, temperature):
    shift_labels()
    begun = begin("lwf", "--lambda-remain", "3", "--lambda-kd", "0.6", "--temperature", str(temperature))
    batch = begun.batch()
    losses = begun.method.loss(begun.model, batch)

    images, labels = batch.split(batch.images), batch.split(batch.labels)
    student = {name: arithmetic.logits(begun.model, images[name]) for name in ("forget", "remain")}
    forget = arithmetic.cross_entropy(student["forget"], (labels["forget"].numpy() + 1) % 6)
    remain = arithmetic.cross_entropy(student["remain"], labels["remain"])
    distillation = arithmetic.kl(arithmetic.logits(begun.before, images["remain"]), student["remain"], temperature)
    assert distillation > 0.1
    assert set(losses) == {"total", "forget", "remain", "distillation"}
    assert losses["forget"].item() == pytest.approx(forget, rel=1e-9)
    assert losses["remain"].item() == pytest.approx(remain, rel=1e-9)
    assert losses["distillation"].item() == pytest.approx(distillation, rel=1e-4)
    assert losses["total"].item() == pytest.approx(forget + 3 * remain + 0.6 * distillation, rel=1e-4)


def test_a_batch_pairs_forgotten_and_remaining_images(begin):
    begun = begin("lwf")
    batch = begun.batch()
    labels = {name: set(part.tolist()) for name, part in batch.split(batch.labels).items()}
    assert set(labels) == {"forget", "remain"}
    assert labels["forget"] <= set(begun.task.forget)
    assert labels["remain"] <= set(begun.task.remain)
