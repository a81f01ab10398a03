"""The scene's draws and refusals, and what a model is to the figures."""

import numpy as np
import pytest
import torch

from tests.conftest import coloured_images, small_recognizer
from tests.util.audit.conftest import CPU, array, gallery, make_up, take_rows
from util.audit.subject import Subject
from util.runtime.errors import UsageError
from util.runtime.hardware import Hardware


def test_the_forgotten_test_images_and_whose_they_are():
    _, scene = make_up(forget=(1, 4, 6))
    labels = scene.test_set.labels.tolist()
    assert scene.forget_test.tolist() == [i for i, label in enumerate(labels) if label in (1, 4, 6)]
    assert scene.remain_test.tolist() == [i for i, label in enumerate(labels) if label not in (1, 4, 6)]
    assert scene.forget_labels.tolist() == [label for label in labels if label in (1, 4, 6)]
    assert [scene.forget[person] for person in scene.who] == scene.forget_labels.tolist()
    assert scene.drawn == 3


def test_of_one_person_the_photos_are_what_is_drawn():
    _, scene = make_up(forget=(4,))
    assert scene.drawn == len(scene.forget_test) + len(scene.forget_train) == 4 + 3
    assert [*scene.who, *scene.who_trained] == [*range(7)]


def test_a_gallery_draws_each_identitys_own_images_anew_and_the_same_again():
    (_, scene), (_, again) = make_up(), make_up()
    labels = scene.train_set.labels.numpy()
    draws = [scene.enrolled(5, draw) for draw in range(10)]
    for draw, chosen in enumerate(draws):
        for c, positions in enumerate(chosen):
            assert (labels[positions] == c).all()
            assert len({*positions.tolist()}) == len(positions) == min(5, (labels == c).sum())
        assert all(map(np.array_equal, chosen, again.enrolled(5, draw)))
        assert all(one == five[0] for (one,), five in zip(scene.enrolled(1, draw), chosen, strict=True))
    for c in range(len(scene.train_set.classes)):
        assert len({tuple(chosen[c].tolist()) for chosen in draws}) > 2
        assert {*labels[np.concatenate([chosen[c] for chosen in draws])]} == {c}
    assert any(a.tolist() != b.tolist() for a, b in zip(draws[0], make_up(seed=1)[1].enrolled(5, 0), strict=True))


@pytest.mark.parametrize(
    ("counts", "complaint"),
    [
        ({"train": (5, 1, 5, 5)}, "c1 has 1 training images: the audit needs 2 or more"),
        ({"test": (5, 0, 5, 5)}, "c1 has no test images"),
        ({"train": (5, 5), "test": (5, 5)}, "1 identities with test images remain"),
    ],
)
def test_too_few_images_or_people_are_refused(counts, complaint):
    _, scene = make_up(forget=(1,), **{"train": (5, 5, 5, 5), "test": (5, 5, 5, 5)} | counts)
    with pytest.raises(UsageError, match=complaint):
        scene.check()


def test_two_training_images_one_test_image_and_two_who_remain_are_enough():
    make_up(forget=(1,), train=(5, 2, 5), test=(5, 1, 5))[1].check()


def test_templates_are_normalized_means_of_unit_embeddings():
    subject, scene = make_up()
    for images in (1, 5):
        np.testing.assert_allclose(subject.templates(scene, images, 3), gallery(subject, scene, images, 3), rtol=1e-5)


@pytest.mark.parametrize("own", [False, True])
def test_rows_of_all_but_the_kept_are_templates_as_long_as_the_others(own):
    subject, scene = make_up(forget=(1, 4))
    expected = array(subject.model.head.weight)
    take_rows(subject.model, (1, 6))
    anew = [1, 6] if own else [1, 4, 6]  # those that are missing, or whoever is forgotten as well
    length = np.mean([np.linalg.norm(expected[c]) for c in range(8) if c not in anew])
    for draw in (0, 4):
        expected[anew] = length * gallery(subject, scene, 5, draw)[anew]
        rows, bias = subject.rows(scene, draw, own)
        np.testing.assert_allclose(array(rows), expected, rtol=1e-5)
        assert bias is None


@pytest.mark.parametrize("head", ["cosface", "arcface", "sface", "softmax"])
def test_logits_over_a_models_own_rows_are_its_own(head):
    subject, scene = make_up(head=head)
    with torch.no_grad():
        expected = subject.model.head(subject.test)
    torch.testing.assert_close(subject.logits(subject.test, *subject.rows(scene, own=True)), expected)


def test_a_row_made_anew_has_the_other_rows_mean_bias():
    subject, scene = make_up(forget=(1, 6), head="softmax")
    bias = array(subject.model.head.bias)
    bias[[1, 6]] = np.mean([bias[c] for c in (0, 2, 3, 4, 5, 7)])
    rows = subject.rows(scene)
    np.testing.assert_allclose(array(rows[1]), bias, rtol=1e-6)
    expected = array(subject.test) @ array(rows[0]).T + bias
    np.testing.assert_allclose(subject.logits(subject.test, *rows), expected, rtol=1e-4, atol=1e-4)


def test_embeddings_are_the_models():
    model, images = small_recognizer().eval(), coloured_images(per_class=3)
    subject = Subject(model, images, images.subset(slice(4)), images.subset(slice(4, 6)), CPU)
    with torch.no_grad():
        expected = model.embed(images.images)
    torch.testing.assert_close(subject.train, expected)
    torch.testing.assert_close(subject.test, expected[:4])
    torch.testing.assert_close(subject.unknown, expected[4:6])


@pytest.mark.parametrize("fast", [False, True], ids=["whole last block", "class token alone"])
def test_tokens_are_the_class_tokens_after_each_block(fast):
    hardware = Hardware(torch.device("cpu"), bf16=False, cls_only_last_block=fast)
    model, images = small_recognizer(depth=3).eval(), coloured_images(per_class=15)  # more than one batch of evaluation
    left, positions = [], torch.arange(80)
    hooks = [block.register_forward_hook(lambda *call: left.append(call[-1][:, 0])) for block in model.backbone.blocks]
    with torch.no_grad():
        embeddings = model.embed(images.images[positions])
    for hook in hooks:
        hook.remove()
    tokens = Subject(model, images, images, None, hardware).tokens(images, positions)
    torch.testing.assert_close(torch.stack(tokens), torch.stack(left))
    with torch.no_grad():
        torch.testing.assert_close(model.backbone.norm(tokens[-1]), embeddings)


def test_without_a_class_token_the_tokens_mean_stands_for_it():
    model = small_recognizer(class_token=False, global_pool="avg").eval()
    images = coloured_images(per_class=2)
    subject = Subject(model, images, images, None, CPU)
    tokens = subject.tokens(images, torch.arange(12))
    assert [part.shape for part in tokens] == [(12, 32), (12, 32)]
    with torch.no_grad():
        x = model.backbone._pos_embed(model.backbone.patch_embed(model.normalize(images.images)))
        x = model.backbone.blocks[0](x)
    torch.testing.assert_close(tokens[0], x.mean(dim=1))


def test_each_identitys_training_images_lie_in_an_order_drawn_once():
    _, scene = make_up()
    labels = scene.train_set.labels.numpy()
    for c, positions in enumerate(scene.train_by_class):
        assert sorted(positions) == np.flatnonzero(labels == c).tolist()
    assert any(sorted(positions) != positions.tolist() for positions in scene.train_by_class)
