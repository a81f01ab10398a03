"""Pre-training."""

from types import SimpleNamespace

import pytest

from data.tasks import pretraining_task
from methods import pretrain
from tests.methods.conftest import first_batch


def test_the_loss_is_its_formula(make_recognizer, make_images, arithmetic, cpu, monkeypatch):
    monkeypatch.setattr(pretrain, "random_flip", lambda images: images.flip(-1))
    images, model = make_images(), make_recognizer().eval()
    method = pretrain.Pretrain(SimpleNamespace(batch_size=8, last_batch="full", mirror="on"), cpu)
    method.begin_task(model, pretraining_task(images.labels, 6), images, 1)
    batch = first_batch(method, images)
    expected = arithmetic.cross_entropy(arithmetic.logits(model, batch.images.flip(-1)), batch.labels)
    assert method.loss(model, batch)["total"].item() == pytest.approx(expected, rel=1e-5)
