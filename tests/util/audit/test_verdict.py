"""From figures to the verdict on a request, and its calibration on models of which the truth is known."""

import numpy as np
import pytest

from util.audit.base import FAMILIES
from util.audit.statistics import INCONCLUSIVE, OVER_FORGOTTEN, STILL_KNOWN, WITHIN, compare
from util.audit.verdict import AS_IF_NEVER_SEEN, NOT_ENOUGH, calibration, judge

FACES, PAIRS, MEMBER, AGAIN = FAMILIES


def entry(
    family: str, verdict: str | None, rho: float = 0.0, power: float = 9.0, significant: bool = False, p: float = 0.009
) -> dict:
    return {"family": family, "verdict": verdict, "rho": rho, "power": power, "significant": significant, "p": p}


def request(*found: tuple[str, str | None], **more: dict) -> dict[str, dict]:
    return {f"{number}": entry(*each) for number, each in enumerate(found)} | more


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        ([(FACES, WITHIN), (PAIRS, WITHIN), (MEMBER, WITHIN)], AS_IF_NEVER_SEEN),
        ([(FACES, WITHIN), (PAIRS, WITHIN), (MEMBER, INCONCLUSIVE), (AGAIN, WITHIN)], AS_IF_NEVER_SEEN),
        ([(FACES, WITHIN), (FACES, WITHIN), (PAIRS, WITHIN), (PAIRS, WITHIN)], NOT_ENOUGH),
        ([(FACES, WITHIN), (AGAIN, WITHIN), (MEMBER, INCONCLUSIVE), (PAIRS, INCONCLUSIVE)], NOT_ENOUGH),
        ([(FACES, INCONCLUSIVE), (PAIRS, None)], NOT_ENOUGH),
        ([], NOT_ENOUGH),
        ([(FACES, WITHIN), (PAIRS, WITHIN), (MEMBER, WITHIN), (AGAIN, OVER_FORGOTTEN)], OVER_FORGOTTEN),
        ([(FACES, OVER_FORGOTTEN), (PAIRS, WITHIN), (FACES, STILL_KNOWN)], STILL_KNOWN),
    ],
)
def test_a_request_is_as_if_never_seen_where_three_families_say_so_and_none_else(found, verdict):
    assert judge(request(*found))["verdict"] == verdict


def test_one_metric_alone_decides_only_where_it_is_highly_significant():
    clean = [(FACES, WITHIN), (PAIRS, WITHIN), (MEMBER, WITHIN)]
    for fault in (STILL_KNOWN, OVER_FORGOTTEN):
        one = request(*clean, one=entry(AGAIN, fault, rho=0.4, p=0.011))
        assert judge(one)["verdict"] == NOT_ENOUGH  # nor is it as if never seen
        assert judge(one)["families"][AGAIN] == fault
        assert judge(one)["undecided"] == ({"figure": "one", "rho": 0.4} if fault == STILL_KNOWN else None)
        assert judge(one | {"two": entry(AGAIN, fault, p=0.04)})["verdict"] == fault
        other = OVER_FORGOTTEN if fault == STILL_KNOWN else STILL_KNOWN
        assert judge(one | {"other": entry(AGAIN, other, p=0.04)})["verdict"] == NOT_ENOUGH
        assert judge(one | {"other": entry(AGAIN, other, p=0.009)})["verdict"] == other
    worse = request(known=entry(AGAIN, STILL_KNOWN, rho=0.4, p=0.02), less=entry(PAIRS, OVER_FORGOTTEN, -0.5, p=0.001))
    assert judge(worse)["verdict"] == OVER_FORGOTTEN and judge(worse)["undecided"] == {"figure": "known", "rho": 0.4}


def test_beside_strangers_one_metric_that_is_significant_decides():
    groups = [50 + (number % 21 - 10) / 2 for number in range(200)]  # mean 50, standard deviation 3
    for value in np.arange(50, 75, 0.1):
        metrics = request((FACES, WITHIN), (PAIRS, WITHIN), (MEMBER, WITHIN))
        metrics["one"] = {"family": FACES} | compare(value, groups, [100], resolution=1.0, independent=40)
        assert (judge(metrics, {"people": 200})["verdict"] == STILL_KNOWN) == (metrics["one"]["verdict"] == STILL_KNOWN)
    assert metrics["one"]["verdict"] == STILL_KNOWN


def test_nothing_upside_down_is_no_evidence_and_something_is():
    metrics = request((PAIRS, WITHIN), (MEMBER, WITHIN), sign_flip=entry(FACES, WITHIN))
    assert judge(metrics)["verdict"] == NOT_ENOUGH
    assert FACES not in judge(metrics)["families"]
    metrics["sign_flip"] = entry(FACES, STILL_KNOWN)
    assert judge(metrics)["verdict"] == judge(metrics)["families"][FACES] == STILL_KNOWN


def test_little_collapse_is_no_evidence_and_much_is():
    metrics = request((FACES, WITHIN), (MEMBER, WITHIN), (PAIRS, INCONCLUSIVE), collapse_1pct=entry(PAIRS, WITHIN))
    assert judge(metrics)["verdict"] == NOT_ENOUGH
    assert judge(metrics)["families"][PAIRS] == INCONCLUSIVE and judge(metrics)["tally"]["within"] == 2
    metrics["collapse_1pct"] = entry(PAIRS, OVER_FORGOTTEN, rho=-0.5)
    assert judge(metrics)["verdict"] == OVER_FORGOTTEN


def test_a_family_says_what_the_clearest_of_its_figures_says():
    found = judge(request((FACES, WITHIN), (FACES, INCONCLUSIVE), (PAIRS, INCONCLUSIVE), (AGAIN, None)))
    assert found["families"] == {FACES: WITHIN, PAIRS: INCONCLUSIVE}


def test_one_tally_counts_figures_with_power_and_those_that_are_off_within_the_margin():
    metrics = request((FACES, WITHIN), (PAIRS, OVER_FORGOTTEN), (MEMBER, None))
    metrics |= {"off": entry(AGAIN, WITHIN, significant=True), "weak": entry(AGAIN, INCONCLUSIVE, power=2.9)}
    metrics |= {"spread": entry(AGAIN, INCONCLUSIVE, rho=0.3)}
    assert judge(metrics)["tally"] == {"within": 2, "significantly_off": 1, "with_power": 4}


def test_the_undecided_figure_that_is_farthest_on_the_way_back_is_named():
    weak = {"weak": entry(FACES, INCONCLUSIVE, 0.5, power=2), "none": entry(PAIRS, INCONCLUSIVE, 40.0, power=0.1)}
    weak["collapse_1pct"] = entry(PAIRS, INCONCLUSIVE, 0.9, power=4)  # no sign of knowing
    metrics = request((FACES, WITHIN), **weak, spread=entry(AGAIN, INCONCLUSIVE, 0.77, power=3.5))
    assert judge(metrics)["undecided"] == {"figure": "spread", "rho": 0.77}
    assert judge(request((FACES, WITHIN)))["undecided"] is None


def measured(family: str, references: list[float], originals: list[float]) -> dict:
    known = sum(originals) / len(originals)
    return entry(family, WITHIN) | {"references": references, "originals": originals, "known": known, "resolution": 1.0}


def test_references_are_judged_by_the_others_and_originals_by_all():
    metrics = {f"{family}": measured(family, [10.0, 11.0, 12.0, 13.0], [80.0, 90.0]) for family in FAMILIES}
    metrics["cka"] = entry("", None)
    about = {"forget": ["ann"], "references": ["a", "b", "c", "d"], "figures": metrics}
    found = calibration([about, about, about | {"forget": ["bob"]}])  # two models on ann, one on bob
    assert found == {"references": {AS_IF_NEVER_SEEN: 8}, "originals": {STILL_KNOWN: 4}, "strangers": {}}
    metrics[AGAIN] = measured(AGAIN, [10.0, 11.0, 12.0, 90.0], [80.0, 90.0])
    found = calibration([about])  # the last reference is far off, and makes the others' yardstick worthless there
    assert found["references"] == {AS_IF_NEVER_SEEN: 3, STILL_KNOWN: 1}
