import random

import pytest
import torch

from data.tasks import class_order, forgetting_tasks, named_classes, named_requests
from tests.conftest import drawn_tasks
from util.runtime.errors import UsageError

LABELS = torch.arange(100).repeat_interleave(30)[torch.randperm(3000, generator=torch.Generator().manual_seed(5))]


def tasks(labels=LABELS, num_classes=100, **options):
    return drawn_tasks(labels, num_classes, **({"num_tasks": 4, "per_task": 20, "seed": 1337} | options))


def test_the_published_class_order():
    # The first ten of the shuffle that the published code makes with its default seed.
    assert class_order(100, 1337)[:10] == [83, 17, 10, 9, 89, 52, 7, 32, 37, 77]
    expected = list(range(100))
    random.Random(1337).shuffle(expected)
    assert class_order(100, 1337) == expected


def test_the_papers_sequence_of_tasks():
    order = class_order(100, 1337)
    sequence = tasks()
    assert [task.setting for task in sequence] == ["100-20", "80-20", "60-20", "40-20"]
    for number, task in enumerate(sequence, start=1):
        kept = 100 - 20 * number
        assert set(task.remain) == set(order[:kept])
        assert set(task.forget) == set(order[kept : kept + 20])
        assert set(task.old) == set(order[kept + 20 :])


@pytest.mark.parametrize("options", [{}, {"few_shot": 4}, {"num_missing": 5}, {"data_ratio": 1.0}, {"num_tasks": 1}])
def test_training_images_are_of_the_right_classes_only(options):
    for task in tasks(**options):
        assert set(LABELS[task.forget_indices].tolist()) == set(task.forget)
        assert set(LABELS[task.remain_indices].tolist()) == set(task.remain) - set(task.missing)
        indices = torch.cat([task.forget_indices, task.remain_indices])
        assert len(indices.unique()) == len(indices)
        assert not set(LABELS[indices].tolist()) & set(task.old)


@pytest.mark.parametrize(
    ("options", "per_class"), [({"data_ratio": 0.1}, 3), ({"few_shot": 4}, 4), ({"data_ratio": 0.001}, 1)]
)
def test_every_class_lends_its_share(options, per_class):
    for task in tasks(**options):
        counts = torch.bincount(LABELS[torch.cat([task.forget_indices, task.remain_indices])], minlength=100)
        assert counts[list(task.forget + task.remain)].unique().tolist() == [per_class]


def test_missing_classes_remain_in_every_task():
    sequence = tasks(num_missing=5)
    assert len({task.missing for task in sequence}) == 1
    assert len(sequence[0].missing) == 5
    assert all(set(task.missing) <= set(task.remain) for task in sequence)


def test_a_task_is_a_pure_function_of_its_arguments():
    def fingerprint(**options):
        return [(task.forget, task.forget_indices.tolist(), task.remain_indices.tolist()) for task in tasks(**options)]

    first = fingerprint()
    random.seed(0)
    torch.manual_seed(0)
    assert fingerprint() == first
    assert fingerprint(num_tasks=2) == first[:2]
    assert fingerprint(seed=1) != first
    # A class that stays known does not lend the same images to every task.
    stays = sorted(set(tasks()[3].remain))[0]
    drawn = [set(task.remain_indices[LABELS[task.remain_indices] == stays].tolist()) for task in tasks()]
    assert len({frozenset(images) for images in drawn}) > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tasks": 5}, "5 tasks of 20 classes: of 100, at least one must remain"),
        ({"few_shot": 31}, "has 30 training images, fewer than the 31"),
        ({"num_missing": 20}, "20 missing classes: of the 20 that remain"),
        ({"num_missing": -1}, "-1 missing classes"),
    ],
)
def test_impossible_requests_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        tasks(**options)


CLASSES = ("ann", "bob", "7", "o'neil, pat", "eve", "mallory")


def test_classes_are_named_or_numbered():
    assert named_classes("bob,ann", CLASSES) == [1, 0]
    assert named_classes(' bob , "o\'neil, pat",#4', CLASSES) == [1, 3, 4]
    assert named_classes("7", CLASSES) == [2]  # a class of that name, not the eighth
    assert named_classes("ann\n\nbob\r\neve,#2,\n", CLASSES) == [0, 1, 4, 2]
    assert named_classes('"two\nlines", #1, " x",#0', ("#1", "two\nlines", " x")) == [1, 0, 2, 0]


@pytest.mark.parametrize("word", ["4", "1", "04", "+4", "\N{SUPERSCRIPT TWO}", "#", "##4", "#6", "#-1"])
def test_a_number_is_no_class_id_unless_it_says_so(word):
    with pytest.raises(UsageError, match="no class"):
        named_classes(f"ann,{word}", CLASSES)
    if word in ("4", "1", "04"):
        with pytest.raises(UsageError, match=f"class id {word} is written #{word}"):
            named_classes(word, CLASSES)


def test_folders_whose_names_are_numbers_are_named_by_them():
    classes = [f"{5 * n:07d}" for n in range(21)]
    assert named_classes("0000005", classes) == [1]
    with pytest.raises(UsageError, match="no class '5'"):
        named_classes("5", classes)


def test_a_name_with_a_line_break_or_spaces_stands_in_quotes():
    classes = ("two\nlines", "  spaces ", 'quo"ted', "spaces", "ann")
    assert named_classes('"two\nlines", "  spaces ",quo"ted,  spaces , "ann "', classes) == [0, 1, 2, 3, 4]
    with pytest.raises(UsageError, match="no class 'two'"):
        named_classes("two\nlines", classes)


def test_named_requests_become_tasks():
    labels = torch.arange(6).repeat_interleave(4)
    requests = named_requests(["bob, ann", "eve"], CLASSES, [[5]])
    assert requests == [[1, 0], [4]]
    _, first, second = forgetting_tasks(labels, 6, [[5], *requests], seed=3, data_ratio=0.5, num_missing=1)
    assert (first.forget, first.old, second.old) == ((0, 1), (5,), (0, 1, 5))
    assert (first.remain, second.remain) == ((2, 3, 4), (2, 3))
    assert first.missing == second.missing == tuple(c for c in class_order(6, 3) if c in (2, 3))[:1]
    assert labels[second.forget_indices].tolist() == [4, 4]
    assert {*labels[second.remain_indices].tolist()} == {2, 3} - {*second.missing}


def test_naming_the_drawn_classes_gives_the_drawn_tasks():
    for drawn in tasks():
        words = [",".join(f"#{c}" for c in task.forget) for task in tasks()]
        requests = named_requests(words, [f"id{c}" for c in range(100)], [])
        named = forgetting_tasks(LABELS, 100, requests, seed=1337)[drawn.number - 1]
        assert (named.forget, named.remain, named.old) == (drawn.forget, drawn.remain, drawn.old)
        assert torch.equal(named.remain_indices, drawn.remain_indices)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ann, bbo"], "no class 'bbo'; did you mean 'bob'"),
        (["6"], "no class '6'; they are 'ann', …, or #0 to #5"),
        (["-1"], "no class '-1'"),
        ([""], "a list of names is empty"),
        ([" , \n"], "a list of names is empty"),
        (["x" * 200_000], "is no list of names"),
        (["ann", "bob,#0"], "task 2 forgets 'ann' already"),
        (["ann,ann"], "task 2 forgets 'ann' already"),
        (["mallory"], "task 1 forgets 'mallory' already"),
        (["#0,#1,#2", "#3,#4"], "all 6 classes would be forgotten"),
    ],
)
def test_impossible_names_are_refused(words, message):
    with pytest.raises(UsageError, match=message):
        named_requests(words, CLASSES, [[5]])
