"""The scene's draws and refusals, and what a model is to the figures."""

import numpy as np
import pytest
import torch

from tests.conftest import coloured_images, small_recognizer
from tests.util.audit.conftest import CPU, array, gallery, make_up, take_rows
from util.audit.inputs import AuditedModel
from util.runtime.errors import UsageError
from util.runtime.hardware import Hardware


def test_the_forgotten_test_images_and_whose_they_are():
    _, task = make_up(forget=(1, 4, 6))
    labels = task.test_set.labels.tolist()
    assert task.forget_test.tolist() == [i for i, label in enumerate(labels) if label in (1, 4, 6)]
    assert task.remain_test.tolist() == [i for i, label in enumerate(labels) if label not in (1, 4, 6)]
    assert task.forget_labels.tolist() == [label for label in labels if label in (1, 4, 6)]
    assert [task.forget[person] for person in task.test_groups] == task.forget_labels.tolist()
    assert task.num_groups == 3


def test_of_one_person_the_photos_are_what_is_drawn():
    _, task = make_up(forget=(4,))
    assert task.num_groups == len(task.forget_test) + len(task.forget_train) == 4 + 3
    assert [*task.test_groups, *task.train_groups] == [*range(7)]


def test_a_gallery_draws_each_identitys_own_images_anew_and_the_same_again():
    (_, task), (_, again) = make_up(), make_up()
    labels = task.train_set.labels.numpy()
    draws = [task.enrolled(5, draw) for draw in range(10)]
    for draw, chosen in enumerate(draws):
        for c, positions in enumerate(chosen):
            assert (labels[positions] == c).all()
            assert len({*positions.tolist()}) == len(positions) == min(5, (labels == c).sum())
        assert all(map(np.array_equal, chosen, again.enrolled(5, draw)))
        assert all(one == five[0] for (one,), five in zip(task.enrolled(1, draw), chosen, strict=True))
    for c in range(len(task.train_set.classes)):
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
    _, task = make_up(forget=(1,), **{"train": (5, 5, 5, 5), "test": (5, 5, 5, 5)} | counts)
    with pytest.raises(UsageError, match=complaint):
        task.check()


def test_two_training_images_one_test_image_and_two_who_remain_are_enough():
    make_up(forget=(1,), train=(5, 2, 5), test=(5, 1, 5))[1].check()


def test_templates_are_normalized_means_of_unit_embeddings():
    audited, task = make_up()
    for images in (1, 5):
        np.testing.assert_allclose(audited.templates(task, images, 3), gallery(audited, task, images, 3), rtol=1e-5)


@pytest.mark.parametrize("own", [False, True])
def test_rows_of_all_but_the_kept_are_templates_as_long_as_the_others(own):
    audited, task = make_up(forget=(1, 4))
    expected = array(audited.model.head.weight)
    take_rows(audited.model, (1, 6))
    anew = [1, 6] if own else [1, 4, 6]  # those that are missing, or whoever is forgotten as well
    length = np.mean([np.linalg.norm(expected[c]) for c in range(8) if c not in anew])
    for draw in (0, 4):
        expected[anew] = length * gallery(audited, task, 5, draw)[anew]
        np.testing.assert_allclose(array(audited.head(task, draw, own).weight), expected, rtol=1e-5)


@pytest.mark.parametrize("head", ["cosface", "arcface", "sface", "softmax"])
def test_logits_over_a_models_own_rows_are_its_own(head):
    audited, task = make_up(head=head)
    with torch.no_grad():
        expected = audited.model.head(audited.test_embeddings)
    torch.testing.assert_close(audited.head(task, own=True)(audited.test_embeddings), expected)


def test_a_row_made_anew_has_the_other_rows_mean_bias():
    audited, task = make_up(forget=(1, 6), head="softmax")
    bias = array(audited.model.head.bias)
    bias[[1, 6]] = np.mean([bias[c] for c in (0, 2, 3, 4, 5, 7)])
    head = audited.head(task)
    np.testing.assert_allclose(array(head.bias), bias, rtol=1e-6)
    expected = array(audited.test_embeddings) @ array(head.weight).T + bias
    np.testing.assert_allclose(head(audited.test_embeddings), expected, rtol=1e-4, atol=1e-4)


def test_embeddings_are_the_models():
    model, images = small_recognizer().eval(), coloured_images(per_class=3)
    audited = AuditedModel(model, images, images.subset(slice(4)), images.subset(slice(4, 6)), CPU)
    with torch.no_grad():
        expected = model.embed(images.images)
    torch.testing.assert_close(audited.train_embeddings, expected)
    torch.testing.assert_close(audited.test_embeddings, expected[:4])
    torch.testing.assert_close(audited.stranger_embeddings, expected[4:6])


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
    tokens = AuditedModel(model, images, images, None, hardware).tokens(images, positions)
    torch.testing.assert_close(torch.stack(tokens), torch.stack(left))
    with torch.no_grad():
        torch.testing.assert_close(model.backbone.norm(tokens[-1]), embeddings)


def test_without_a_class_token_the_tokens_mean_stands_for_it():
    model = small_recognizer(class_token=False, global_pool="avg").eval()
    images = coloured_images(per_class=2)
    audited = AuditedModel(model, images, images, None, CPU)
    tokens = audited.tokens(images, torch.arange(12))
    assert [part.shape for part in tokens] == [(12, 32), (12, 32)]
    with torch.no_grad():
        x = model.backbone._pos_embed(model.backbone.patch_embed(model.normalize(images.images)))
        x = model.backbone.blocks[0](x)
    torch.testing.assert_close(tokens[0], x.mean(dim=1))


def test_each_identitys_training_images_lie_in_an_order_drawn_once():
    _, task = make_up()
    labels = task.train_set.labels.numpy()
    for c, positions in enumerate(task.train_by_class):
        assert sorted(positions) == np.flatnonzero(labels == c).tolist()
    assert any(sorted(positions) != positions.tolist() for positions in task.train_by_class)
