"""The audit of small trained models: what it says of references, of originals, and of models that only seem to forget."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.conftest import coloured_images, small_recognizer
from tests.util.audit.conftest import CPU, patterns, take_rows
from util.audit import AUDIT_METRICS, relearning
from util.audit.audit import Audit, MeasurementCache, audit, check_references
from util.audit.statistics import INCONCLUSIVE, OVER_FORGOTTEN, STILL_KNOWN, WITHIN
from util.runtime.errors import UsageError
from util.storage.hashes import check_strangers

# With the embedding and what comes before it alone.
WITHOUT_THE_HEAD = {"enrolment_1", "enrolment_5", "tpir_1pct", "verification_auc", "verification_tar_1pct", "collapse_1pct"}
WITHOUT_THE_HEAD |= {"probe_embedding", "probe_block_0"}
STRONG = {"enrolment_1", "enrolment_5", "tpir_1pct", "verification_auc"}


@pytest.fixture(scope="session")
def look(world, tmp_path_factory):
    """look(model) → its audit beside two originals, with few steps of relearning; what others measure is kept."""
    cache = tmp_path_factory.mktemp("audits")

    def look(after, references=world.references, **options) -> Audit:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(relearning, "STEPS", (0, 1, 2, 5, 10))
            before, known = world.originals[0], world.originals[1:2]
            options = {"stranger_set": world.stranger_set, "hardware": CPU, "originals": known, "cache": cache} | options
            return audit(before, after, references, world.data, world.forget, **options)

    return look


@pytest.fixture(scope="session")
def original(world, look) -> Audit:
    """The audit of an original that is not among those that it is compared with."""
    return look(world.originals[2])


def verdicts(found: Audit) -> dict[str, str]:
    return {key: entry["verdict"] for key, entry in found.metrics.items() if entry["verdict"]}


def edited(model, edit):
    model = copy.deepcopy(model)
    with torch.no_grad():
        edit(model)
    return model


def test_every_key_is_there_with_its_numbers_or_a_reason(original):
    keys = {key for metric in AUDIT_METRICS.values() for key in metric.titles} | {"probe_block_0"}
    assert {*original.metrics} == keys
    for key, entry in original.metrics.items():
        assert (entry["verdict"] is None) == ("reason" in entry)
        if key != "verification_tar_01pct":
            assert (len(entry["references"]), len(entry["originals"])) == (6, 2)
    about = json.loads(json.dumps(original.as_dict(), allow_nan=False))
    assert about["forget"] == ["p2", "p5", "p8", "p11", "p14", "p17"]
    assert about["images"] == 60
    assert {"probe", "roc", "cka", "relearn_1", "relearn_5", "relearn_kept_only"} == {*about["curves"]}
    assert all({*curve} == {"after", "before", "references"} for curve in about["curves"].values())


def test_a_verdict_can_be_worked_out_from_the_entry(original):
    judged = {key: entry for key, entry in original.metrics.items() if entry["verdict"]}
    assert len(judged) == 18
    for key, entry in judged.items():
        seen_by = original.metrics["acc_forget" if key == "sign_flip" else key]["originals"]
        mean, known = np.mean(entry["references"]), np.mean(seen_by)
        spread = max(np.std(entry["references"], ddof=1), 100 / (120 if key.startswith("photos_") else 60))
        assert entry["known"] == pytest.approx(known, abs=1e-3)
        assert entry["delta"] == pytest.approx(entry["value"] - mean, abs=1e-3)
        assert entry["z"] == pytest.approx((entry["value"] - mean) / spread / (7 / 6) ** 0.5, abs=1e-3)
        assert entry["power"] == pytest.approx(abs(known - mean) / spread, abs=1e-3)
        assert entry["rho"] * (known - mean) == pytest.approx(entry["value"] - mean, abs=0.1)
        assert entry["interval"][0] <= entry["value"] <= entry["interval"][1]


def test_an_original_is_still_known_wherever_that_can_be_told(original):
    # With some power to spare: an original may be a little less sure than the others are on average.
    can_tell = {key for key, entry in original.metrics.items() if (entry["power"] or 0) >= 4}
    assert can_tell >= STRONG | {"acc_forget", "relearn_1"}
    # A model in its own right neither flips signs, nor fits the rows of the pre-trained one; little collapse is no sign.
    silent = {"sign_flip", "collapse_1pct", "relearn_kept_only"}
    assert {verdicts(original)[key] for key in can_tell - silent} == {STILL_KNOWN}
    assert verdicts(original)["sign_flip"] == WITHIN
    assert original.verdict == STILL_KNOWN


def test_a_reference_left_out_is_not_known_to_the_others(world, look):
    found = []
    for number, reference in enumerate(world.references):
        left_out = look(reference, [model for model in world.references if model is not reference])
        found += [(number, key, verdict) for key, verdict in verdicts(left_out).items()]
    assert len(found) == 6 * 18
    assert sum(verdict == STILL_KNOWN for *_, verdict in found) <= 0.1 * len(found), found
    assert sum(verdict == WITHIN for *_, verdict in found) > 0.3 * len(found)


def negate(model, forget) -> None:
    model.head.weight[forget] *= -1


def permute(model, forget) -> None:
    model.head.weight[forget] = model.head.weight[forget].roll(1, dims=0)


@pytest.mark.parametrize("edit", [negate, permute])
def test_an_edit_of_the_head_alone_leaves_the_person_in_all_else(world, look, edit):
    found = look(edited(world.originals[0], lambda model: edit(model, [*world.forget]))).metrics
    for key in WITHOUT_THE_HEAD | {"acc_forget", "relearn_1", "relearn_5", "relearn_kept_only"}:
        assert found[key]["value"] == found[key]["originals"][0], key
    assert {found[key]["verdict"] for key in STRONG | {"acc_forget"}} == {STILL_KNOWN}


def test_negated_rows_are_caught_by_the_readout(world, look):
    found = look(edited(world.originals[0], lambda model: negate(model, [*world.forget])), metrics=["readout"]).metrics
    before = found["acc_forget"]["originals"][0]
    assert 0.75 * before < found["sign_flip"]["value"] <= 100
    assert found["sign_flip"]["verdict"] == STILL_KNOWN
    # The originals do not flip signs: how well they know the person is what they recognize as they are.
    assert found["sign_flip"]["originals"] == pytest.approx([0, 0], abs=5)
    assert found["sign_flip"]["known"] == found["acc_forget"]["known"]


@pytest.fixture(scope="session")
def one_point(world, look) -> Audit:
    """The audit of an original whose embedding is the same for every face."""

    def flatten(model) -> None:
        model.backbone.norm.weight.zero_()
        model.backbone.norm.bias.copy_(torch.linspace(-1, 1, 32))

    names = [name for name in AUDIT_METRICS if name != "relearning"]
    return look(edited(world.originals[0], flatten), metrics=names)


def test_one_point_for_all_faces_is_over_forgotten(one_point):
    found = one_point.metrics
    assert found["enrolment_5"]["verdict"] == found["verification_auc"]["verdict"] == OVER_FORGOTTEN
    for key in ("acc_forget", "probe_embedding", "verification_tar_1pct"):
        assert found[key]["verdict"] == (OVER_FORGOTTEN if found[key]["power"] >= 3 else INCONCLUSIVE)
    assert found["verification_auc"]["value"] == found["membership_images"]["value"] == 50


def test_one_point_for_all_faces_is_nowhere_still_known_but_below_it(one_point):
    known = {key for key, verdict in verdicts(one_point).items() if verdict == STILL_KNOWN}
    assert known == {"probe_block_0"}, "the block before it tells people apart as ever"


def test_what_references_and_originals_measure_is_kept(world, look, tmp_path, monkeypatch):
    names = ["readout", "enrolment", "verification"]
    first = look(world.originals[2], cache=tmp_path, metrics=names)
    files = {*tmp_path.iterdir()}
    assert len(files) == 3 * (6 + 2)
    with monkeypatch.context() as patch:
        patch.setattr(MeasurementCache, "_measure", lambda *_: pytest.fail("measured again"))
        again = look(world.originals[2], cache=tmp_path, metrics=names)
        other = look(world.references[0], world.references[1:], cache=tmp_path, metrics=names)
    assert again.as_dict() == first.as_dict() == look(world.originals[2], cache=None, metrics=names).as_dict()
    assert other.metrics["enrolment_5"]["value"] == first.metrics["enrolment_5"]["references"][0]
    assert {*tmp_path.iterdir()} == files


def test_another_question_is_not_answered_from_the_cache(world, look, tmp_path):
    few = {"references": world.references[:3], "originals": (), "metrics": ["enrolment"]}
    look(world.originals[2], cache=tmp_path, **few)
    for number, change in enumerate(({"seed": 1}, {"remain": [0, 1, 3, 4]}, {"stranger_set": None}), start=1):
        assert len([*tmp_path.iterdir()]) == 4 * number
        found = look(world.originals[2], cache=tmp_path, **few | change)
        assert found.metrics == look(world.originals[2], cache=None, **few | change).metrics
    assert len([*tmp_path.iterdir()]) == 16


def test_who_is_to_be_known_can_be_named(world, look):
    found = look(world.references[0], world.references[1:4], remain=[0, 3], metrics=["verification"])
    assert found.task.remain == (0, 3)
    assert found.metrics["verification_tar_01pct"]["reason"] == "needs 10000 impostor pairs of kept faces, there are 100"
    assert len(found.task.remain_test) == 20


@pytest.fixture
def never_seen():
    models = [small_recognizer() for _ in range(3)]
    for number, model in enumerate(models):
        model.head.weight.data *= 1 + number  # no two are the same
        take_rows(model, (1, 4))
    return models


def test_references_must_be_three_and_never_have_seen_the_person(never_seen):
    names = tuple("abcdef")
    check_references(never_seen, [1, 4], names)
    with pytest.raises(UsageError, match=r"^two references are the same model"):
        check_references([*never_seen, never_seen[0]], [1, 4], names)
    with pytest.raises(UsageError, match=r"^2 references: .* fewer than 3"):
        check_references(never_seen[:2], [1, 4], names)
    with pytest.raises(UsageError, match=r"^reference 1 was trained with 1 of the 3 forgotten identities, 'f' first"):
        check_references(never_seen, [1, 4, 5], names)
    with torch.no_grad():
        never_seen[2].head.weight[4, 7] = 1e-3
    with pytest.raises(UsageError, match=r"^reference 3 was trained with 1 of the 2 forgotten identities, 'e' first"):
        check_references(never_seen, [1, 4], names)
    with pytest.raises(UsageError, match=r"^reference 3 was trained with"):
        data = coloured_images(), coloured_images(seed=1)
        audit(small_recognizer(), small_recognizer(), never_seen, data, [4, 1], hardware=CPU)


def test_strangers_must_be_in_no_training_set(never_seen):
    train_set, strangers = patterns(range(6), 4, seed=0), patterns(range(20, 26), 4, seed=1)
    check_strangers(strangers, train_set)
    with pytest.raises(UsageError, match=r"^--strangers has 2 identities of the training set, 'p4' first"):
        check_strangers(patterns(range(4, 9), 4, seed=1), train_set)
    strangers.images[[3, 9]] = train_set.images[[17, 0]]
    with pytest.raises(UsageError, match=r"^--strangers has 2 images of the training set, of 'p20' first"):
        check_strangers(strangers, train_set)
    with pytest.raises(UsageError, match=r"^--strangers has 2 images"):
        data = train_set, patterns(range(6), 2, seed=2)
        audit(small_recognizer(), small_recognizer(), never_seen, data, [1, 4], strangers, hardware=CPU)


def test_too_few_images_are_refused(never_seen):
    data = coloured_images(per_class=1), coloured_images(seed=1)
    with pytest.raises(UsageError, match=r"^c1 has 1 training images"):
        audit(small_recognizer(), small_recognizer(), never_seen, data, [1, 4], hardware=CPU)


@pytest.mark.parametrize("head", ["cosface", "softmax"])
def test_people_without_images_take_no_part(head, monkeypatch):
    """What is found is what would be, had there never been rows for them; d is gone."""
    monkeypatch.setattr(relearning, "STEPS", (0, 1))
    small = [coloured_images(7, per_class, seed=seed) for per_class, seed in ((4, 0), (3, 1))]
    names = tuple("abcdefgh")
    place = torch.tensor([0, 1, 2, 4, 5, 6, 7])
    gaps = tuple(replace(images, labels=place[images.labels], classes=names) for images in small)
    small = tuple(replace(images, classes=names[:3] + names[4:]) for images in small)
    whole, fewer = [], []
    for number in range(5):
        whole.append(
            edited(
                small_recognizer(8, head),
                lambda m, n=number: [p.add_(0.1 * n * torch.randn_like(p)) for p in m.parameters()],
            )
        )
        fewer.append(small_recognizer(7, head))
        if number > 1:
            take_rows(whole[-1], [1, 3, 4])
        fewer[-1].backbone.load_state_dict(whole[-1].backbone.state_dict())
        fewer[-1].head.load_state_dict({key: rows[place] for key, rows in whole[-1].head.state_dict().items()})
    options = {"stranger_set": coloured_images(9, 2, seed=3).subset(slice(14, None)), "hardware": CPU}
    options["stranger_set"] = replace(options["stranger_set"], classes=tuple(f"u{c}" for c in range(9)))
    one, other = (
        audit(models[0], models[1], models[2:], data, forget, **options)
        for models, data, forget in ((whole, gaps, [1, 4]), (fewer, small, [1, 3]))
    )
    assert json.dumps(one.as_dict(), allow_nan=False) == json.dumps(other.as_dict(), allow_nan=False)
    with pytest.raises(UsageError, match="the images of d are gone: nothing of them can be audited"):
        audit(whole[0], whole[1], whole[2:], gaps, [1, 3], **options)
