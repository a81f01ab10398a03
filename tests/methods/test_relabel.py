import pytest
import torch

from methods.relabel import wrong_labels


@pytest.mark.parametrize("num_classes", [2, 3, 7])
def test_a_wrong_label_is_never_the_right_one_and_all_others_occur(num_classes):
    torch.manual_seed(0)
    labels = torch.arange(num_classes).repeat(400)
    wrong = wrong_labels(labels, num_classes)
    assert wrong.shape == labels.shape
    assert wrong.dtype == labels.dtype
    for label in range(num_classes):
        assert set(wrong[labels == label].tolist()) == set(range(num_classes)) - {label}


def test_wrong_labels_are_uniform_over_the_other_classes():
    torch.manual_seed(0)
    draws, classes = 6000, 7
    for label in range(classes):
        counts = torch.bincount(wrong_labels(torch.full((draws,), label), classes), minlength=classes).double()
        counts = torch.cat([counts[:label], counts[label + 1 :]])
        expected = draws / (classes - 1)
        chi_square = float(((counts - expected) ** 2 / expected).sum())
        assert chi_square < 20.5  # 5 degrees of freedom: exceeded by one draw in a thousand


def test_wrong_labels_are_drawn_anew_at_every_call():
    torch.manual_seed(0)
    labels = torch.zeros(50, dtype=torch.long)
    draws = {tuple(wrong_labels(labels, 6).tolist()) for _ in range(5)}
    assert len(draws) == 5


@pytest.mark.parametrize("name", ["lwf", "der", "der_pp", "fdr", "lirf", "l2", "ewc", "mas"])
def test_a_method_draws_other_wrong_labels_when_it_sees_a_batch_again(begin, name):
    begun = begin(name)
    batch = begun.batch()
    torch.manual_seed(0)
    part = "relabelled" if name in ("l2", "ewc", "mas") else "forget"
    losses = {begun.method.loss(begun.model, batch)[part].item() for _ in range(4)}
    assert len(losses) == 4
