import pytest
import torch

from tests.conftest import drawn_tasks
from util.evaluation.evaluate import accuracies_after, accuracies_before, embed_images, predict
from util.evaluation.metrics import h_mean
from util.runtime.hardware import Hardware


@pytest.fixture
def model(make_recognizer):
    return make_recognizer(pos_drop_rate=0.5)


@pytest.fixture
def images(make_images):
    return make_images(per_class=5)


@pytest.mark.parametrize("head", ["cosface", "arcface", "softmax"])
def test_class_group_accuracies_against_a_loop_over_images(make_recognizer, images, cpu, head):
    model = make_recognizer(head=head).eval()
    with torch.no_grad():
        model.head.weight.copy_(model.embed(images.images[::5]))  # so that a good part of the images is recognized
    group = [0, 2, 5]
    hits = {"acc": [], "margin_acc": []}
    for image, label in zip(images.images, images.labels, strict=True):
        if label.item() not in group:
            continue
        with torch.no_grad():
            plain = model(image[None])
            margin = model.head.add_margin(plain, label[None])
        hits["acc"].append(plain.argmax().item() == label.item())
        hits["margin_acc"].append(margin.argmax().item() == label.item())
    expected = {key: pytest.approx(100 * sum(values) / len(values)) for key, values in hits.items()}
    found = predict(model, images, cpu).accuracies(group)
    assert found == expected
    if head != "softmax":
        assert found["margin_acc"] < found["acc"]


def test_embeddings_are_those_of_evaluation_mode_in_any_chunking(model, images, cpu, monkeypatch):
    model.train()
    once = embed_images(model, images, cpu)
    assert model.training, "the mode is put back"
    monkeypatch.setattr(Hardware, "eval_batch", 7)
    torch.testing.assert_close(embed_images(model, images, cpu), once)
    chosen = torch.tensor([4, 11, 29])
    torch.testing.assert_close(embed_images(model, images, cpu, chosen), once[chosen])
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(once, model.embed(images.images))


def test_predictions_are_the_same_in_any_chunking(model, images, cpu, monkeypatch):
    whole = predict(model, images, cpu)
    monkeypatch.setattr("util.evaluation.evaluate.LOGITS", 7 * len(images.classes))
    parts = predict(model, images, cpu)
    assert torch.equal(whole.predicted, parts.predicted)
    assert torch.equal(whole.margin_correct, parts.margin_correct)


def test_a_task_reports_all_of_its_groups(model, images, cpu):
    predictions = predict(model, images, cpu)
    first, second = drawn_tasks(images.labels, 6, num_tasks=2, per_task=2, seed=1, data_ratio=1.0)
    before = accuracies_before(predictions, second)
    after = accuracies_after(predictions, second, before)
    for reading in ("", "margin_"):
        for group in ("remain", "forget", "old"):
            assert after[f"{reading}acc_{group}"] == predictions.accuracies(getattr(second, group))[f"{reading}acc"]
        assert after[f"{reading}acc_missing"] is None
        forget = after[f"{reading}acc_forget"]
        assert after[f"{reading}h_mean"] == h_mean(after[f"{reading}acc_remain"], forget, forget) == 0.0
    assert accuracies_after(predictions, first, before)["acc_old"] is None
