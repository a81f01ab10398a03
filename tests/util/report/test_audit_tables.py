"""Audits side by side, and every figure of one, as tables."""

import pytest

from methods import METHODS
from util.audit import AUDIT_METRICS
from util.audit.statistics import INCONCLUSIVE, OVER_FORGOTTEN, STILL_KNOWN, WITHIN
from util.audit.verdict import NOT_ENOUGH, VERDICTS, judge
from util.report.audit_tables import audit_markdown, comparison_markdown, overview, summary, verdicts

FAMILY = {key: figure.family for figure in AUDIT_METRICS.values() for key in figure.titles}
NAMES = ("sign_flip", "enrolment_1", "enrolment_5", "verification_auc")


def figure(value: float | None = 50.0, references=(10.0, 20.0, 40.0), **more) -> dict:
    nothing = dict.fromkeys(("interval", "known", "delta", "z", "rho", "power", "verdict"))
    nothing |= {
        "p": 0.0 if more.get("verdict") else None,
        "significant": False,
        "family": "verification",
        "resolution": 100 / 8,
    }
    return {**nothing, "value": value, "references": [*references], "originals": [99.0, 90.0], **more}


def request(task: int = 1, after_task: int = 1, verdict: str = "", **figures) -> dict:
    for key, entry in figures.items():
        entry["family"] = FAMILY.get(key, "verification")
    about = {"task": task, "after_task": after_task, "forget": ["ann", "bob"], "images": 8, "references": []}
    about |= judge(figures) | ({"verdict": verdict} if verdict else {})
    useful = {"acc_remain": 90.0, "verification_auc_remain": 80.0, "old_templates_tar_1pct": 70.0}
    never = [{"acc_remain": acc, "verification_auc_remain": 80.0} for acc in (92.0, 94.0)]
    others = {"before": useful | {"acc_remain": 95.0}, "references": never}
    return {**about, "figures": figures, "utility": useful | others}


def audited(label: str, *requests: dict, h_mean: float | None = 80.0) -> tuple[str, dict | None, dict]:
    """What `overview` takes of one model; with no `h_mean` as of a bare checkpoint."""
    requests = requests or (request(verdict="still known", **{name: figure() for name in NAMES}),)
    tasks = [{"task": r["after_task"], "after": {"h_mean": h_mean}} for r in requests]
    content = {"method": label, "data": "faces", "first_look": [], "requests": [*requests]}
    return label, None if h_mean is None else {"tasks": tasks}, content


def table(lines: list[str]) -> dict[str, list[str]]:
    """By label, the cells of an overview's only table: H, four figures, how many are within the margin, and the verdict."""
    found = {line[:12].rstrip(): line[12:] for line in lines[3:]}
    end = lines[2].index("in margin") + len("in margin") - 12
    return {label: [*rest.split()[:5], rest[41:end].strip(), rest[end:].strip()] for label, rest in found.items()}


def cells(text: str) -> dict[str, list[str]]:
    """By label, the cells of the Markdown table in a text."""
    found = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    return {label: rest for label, *rest in found}


def test_a_row_per_model_below_never_seen_and_the_pre_trained_one():
    second = request(verdict="over-forgotten", sign_flip=figure(1.26), verification_auc=figure(0.0))
    title, blank, header, *_ = lines = overview([audited("GS-LoRA"), audited("L2*", second)], 12)
    assert (title, blank) == ("Request 1: are its 2 people still known? 8 test faces, %", "")
    assert " ".join(header.split()) == "H ↑ inverted re-id 1 re-id 5 AUC in margin verdict"
    assert table(lines) == {
        "Never seen": ["–", *["23.3"] * 4, "", ""],
        "Pre-train": ["–", *["99.0"] * 4, "", ""],
        "GS-LoRA": ["80.00", *["50.0"] * 4, "0 of 0", "still known"],
        "L2*": ["80.00", "1.3", "–", "–", "0.0", "0 of 0", "over-forgotten"],
    }


def test_the_tally_of_audit_json_is_the_one_that_all_tables_show():
    figures = {
        "acc_forget": judged(0.0, 0.0, WITHIN),
        "sign_flip": judged(0.0, 0.0, WITHIN),  # originals show nothing of it
        "enrolment_1": judged(1.0, 0.1, WITHIN) | {"significant": True},
        "enrolment_5": judged(1.0, 0.3, INCONCLUSIVE),  # has power, and the references differ
        "relearn_1": judged(1.0, 0.4),
        "relearn_5": judged(1.0, -0.4, OVER_FORGOTTEN),
        "membership_images": judged(1.0, 0.0, INCONCLUSIVE) | {"power": 2.99},
        "tpir_1pct": figure(None, (), reason="needs --strangers") | {"originals": []},
        "cka": figure(0.5, reason="a picture of where, no verdict"),
    }
    one = audited("model", request(**figures))
    assert table(overview([one], 12))["model"][5] == "2 of 5 (1*)"
    assert cells(comparison_markdown([one]))["model"][-1] == "2 of 5 (1*)"
    told = "Within the margin (20% of the way from never seen to known): 2 of 5 metrics with power, "
    told += "1 of these significantly off*. "
    told += "By family: re-identification: within the margin; membership: inconclusive; relearning: still known"
    assert summary(one[2]["requests"][0]) == told
    assert f"8 test faces: **still known**\n\n{told}.\n\n" in audit_markdown(one[2])


def test_too_little_evidence_names_the_worst_undecided_figure():
    figures = {"enrolment_1": judged(1.0, 0.77, INCONCLUSIVE), "relearn_1": judged(1.0, 0.3, INCONCLUSIVE)}
    one = request(**figures)
    assert one["verdict"] == NOT_ENOUGH
    assert summary(one).endswith(". Worst undecided: re-identification from 1 photo, 77% of the way back")
    figures["enrolment_1"]["rho"] = figures["relearn_1"]["rho"] = 0.1  # nothing to worry about
    assert "Worst" not in summary(request(**figures))
    assert "By family: no metric judged" in summary(request())


def test_a_model_in_ruins_is_said_to_be_one():
    one = audited("L2*", request(sign_flip=judged(0.0, 0.0, WITHIN)))
    assert "ruined" not in "\n".join(verdicts([one]))
    useful = one[2]["requests"][0]["utility"]
    useful["before"], useful["acc_remain"] = useful["before"] | {"acc_remain": 96.9}, 2.1
    assert verdicts([one])[0] == "L2*: kept people's accuracy fell from 97 to 2%: a ruined model looks forgetful"


def test_a_first_look_is_called_one():
    content = audited("L2*", request(sign_flip=judged(0.0, 0.0, WITHIN)))[2] | {"first_look": ["3 models", "without cka"]}
    assert audit_markdown(content).split("\n\n")[1] == "**First look**: 3 models; without cka."
    assert overview([("L2*", None, content)])[0].startswith("Request 1, a first look: ")
    assert overview([("L2*", None, content | {"first_look": []})])[0].startswith("Request 1: ")


def test_what_was_not_measured_is_a_dash():
    reason = figure(None, (), reason="needs two people") | {"originals": []}
    lines = overview([audited("model", request(verification_auc=reason, cka=figure()), h_mean=None)], 12)
    assert table(lines)["model"] == [*["–"] * 5, "0 of 0", "not enough evidence"]
    assert table(lines)["Never seen"][:5] == ["–"] * 5


@pytest.mark.parametrize("verdict", VERDICTS)
@pytest.mark.parametrize("value", [0.0, 100.0])
def test_columns_align_and_fit_a_terminal(verdict, value):
    longest = max((method.title for method in METHODS.values()), key=len) + ", seed 1337"
    figures = {name: figure(value, (0.0, 0.0, value)) for name in NAMES}
    audits = [audited(label, request(verdict=verdict, **figures), h_mean=value) for label in ("L2*", longest, "x" * 23)]
    lines = overview(audits)[2:]
    assert len({len(line) for line in lines}) == 1
    assert max(map(len, lines)) <= 100
    header, never, known, *others = lines
    end = header.index("AUC") + len("AUC")
    for line, number in ((never, f"{value / 3:.1f}"), (known, "99.0"), *((line, f"{value:.1f}") for line in others)):
        assert line[:end].endswith(f" {number}")
    assert [line[:23].rstrip() for line in lines] == ["", "Never seen", "Pre-train", "L2*", longest, "x" * 23]


def test_rows_that_are_printed_as_audits_end_stand_below_each_other():
    """The first with its head, of the further ones the last line."""
    audits = [audited("L2*", h_mean=97.5), audited("GS-LoRA++", h_mean=100.0), audited("EWC*", h_mean=0.0)]
    lines = [overview([one], 9)[-1] for one in audits]
    assert len({line.index("50.0") for line in lines}) == 1
    assert len({len(line) for line in lines}) == 1


def test_each_request_has_a_table():
    moments = [(1, 1), (2, 2), (1, 2)]
    requests = [request(*moment, **{name: figure(10.0 * n) for name in NAMES}) for n, moment in enumerate(moments)]
    lines = overview([audited("L2*", *requests), audited("EWC*", *requests)])
    heads = [line for line in lines if line.startswith("Request")]
    assert [head.split(":")[0] for head in heads] == ["Request 1", "Request 2", "Request 1, after task 2"]
    assert [lines[lines.index(head) - 1] for head in heads[1:]] == ["", ""]
    values = [line.split()[2:6] for line in lines if line.startswith("EWC*")]
    assert values == [["0.0"] * 4, ["10.0"] * 4, ["20.0"] * 4]


def test_a_model_with_fewer_requests_has_no_row_in_the_further_tables():
    first, second = request(1, 1, sign_flip=figure()), request(2, 2, sign_flip=figure())
    for audits in ([("L2*", [first, second]), ("EWC*", [first])], [("EWC*", [first]), ("L2*", [first, second])]):
        lines = overview([audited(label, *requests) for label, requests in audits])
        assert [line.split(":")[0] for line in lines if line.startswith("Request")] == ["Request 1", "Request 2"]
        assert [line.split()[0] for line in lines if line[:2] in ("L2", "EW")] == [*(label for label, _ in audits), "L2*"]


def test_models_of_one_label_keep_a_row_each():
    lines = overview([audited("L2*", request(sign_flip=figure(value))) for value in (12.0, 34.0)])
    assert [line.split()[2] for line in lines if line.startswith("L2*")] == ["12.0", "34.0"]


def judged(value: float, rho: float | None, verdict: str = "still known") -> dict:
    return figure(
        value, rho=rho, verdict=verdict, power=4.0, known=94.5, significant=verdict in (STILL_KNOWN, OVER_FORGOTTEN)
    )


def test_a_comparison_has_every_figure_that_is_judged_with_its_verdict():
    one = request(sign_flip=judged(1.26, 1.0), probe_block_0=judged(2.0, 1.0), cka=figure(0.5, reason="no verdict"))
    other = request(sign_flip=judged(0.0, -0.5, "over-forgotten"), probe_block_0=judged(3.0, 0.0, WITHIN), cka=figure(0.4))
    text = comparison_markdown([audited("L2*", one), audited("EWC*", other, h_mean=None)])
    assert text.startswith("**Request 1**: 2 people, 8 test faces, K = 3. ▲ still known, ▼ over-forgotten, ")
    assert cells(text) == {
        "Method": ["H", "`sign_flip`", "in margin"],
        "Never seen": ["", "23.3 ± 15.3", ""],
        "Originals": ["", "94.5", ""],
        "L2*": ["80.00", "1.3 ▲", "0 of 2"],
        "EWC*": ["–", "0.0 ▼", "1 of 1"],
    }


def test_a_comparison_of_what_has_no_verdict_is_said_without_numbers():
    reason = figure(None, (), reason="needs --strangers") | {"originals": []}
    for figures in ({"cka": figure(0.5, reason="a picture of where, no verdict")}, {"membership_person": reason}):
        text = comparison_markdown([audited("L2*", request(**figures)), audited("EWC*", request(**figures))])
        assert "Request 1" in text


def test_a_comparison_of_runs_with_fewer_requests():
    first, second = request(1, 1, sign_flip=judged(1.0, 0.5)), request(2, 2, sign_flip=judged(2.0, 0.5))
    one, other = comparison_markdown([audited("EWC*", first), audited("L2*", first, second)]).split("**Request 2**")
    assert [*cells(one)][3:] == ["EWC*", "L2*"]
    assert [*cells(other)][3:] == ["L2*"]


def test_every_figure_with_its_numbers_in_one_table():
    entry = {"interval": [41.04, 59.96], "known": 94.5, "z": 1.5123, "rho": 0.3527, "power": 4.7, "verdict": "still known"}
    figures = {
        "sign_flip": figure(**entry),
        "enrolment_1": judged(25.0, 0.1, WITHIN) | {"significant": True},
        "probe_block_3": figure(0.0, verdict=INCONCLUSIVE, interval=[0.0, 0.0], known=23.3, z=-0.001, power=0.0),
        "tpir_1pct": figure(None, (), reason="needs --strangers") | {"originals": []},
        "cka": figure(0.25, (0.5, 0.5, 0.5), reason="a picture of where, no verdict"),
    }
    text = audit_markdown(audited("L2*", request(2, 3, **figures))[2])
    title, heading = text.split("\n\n")[:2]
    assert title == "# Audit of L2* on faces"
    assert heading == "## Request 2, after task 3: 2 people, 8 test faces: **still known**"
    found = cells(text)
    columns = ["Value", "95% interval", "Never seen", "Original", "ρ", "z", "p", "Power", "Verdict"]
    expected = {
        "Metric": columns,
        "inverted ranking: the smallest logit, over its own rows (`sign_flip`)": [
            *("50.00", "41.0 to 60.0", "23.33", "94.50", "0.35", "1.51", "0.00", "4.70", "still known")
        ],
        "re-identification from 1 photo (`enrolment_1`)": [
            *("25.00", "–", "23.33", "94.50", "0.10", "–", "0.00", "4.00", "within the margin, and yet significantly off")
        ],
        "linear probe after block 3 (`probe_block_3`)": [
            *("0.00", "0.0 to 0.0", "23.33", "94.50", "–", "-0.00", "0.00", "0.00", "inconclusive")
        ],
        "open-set identification from 5 photos (TPIR at FPIR 1%) (`tpir_1pct`)": [*["–"] * 8, "needs --strangers"],
        "similarity to models that never saw them (CKA) (`cka`)": [
            *("0.25", "–", "0.50", "94.50", "–", "–", "–", "–", "a picture of where, no verdict")
        ],
    }
    assert found == expected
    assert text.split("\n\n")[4] == (
        "Kept people, before → after (never seen): top-1 accuracy 95.00 → 90.00 (93.00), "
        "verification AUC 80.00 → 80.00 (80.00), old templates: TAR at FMR 1% 70.00 → 70.00 (–)."
    )


def test_a_bare_checkpoint_and_no_verification_among_the_kept():
    content = audited("", request(cka=figure(reason="no verdict")))[2] | {"method": None}
    useful = content["requests"][0]["utility"]
    for of in (useful, *useful["references"]):
        of["verification_auc_remain"] = None
    text = audit_markdown(content)
    assert text.startswith("# Audit of a checkpoint on faces")
    assert "verification AUC 80.00 → – (–)" in text


def test_the_calibration_counts_the_verdicts_on_references_and_originals():
    """A face is worth 12.5, more than the references' own spread where they agree; of the first metric 2."""
    figures = {
        # The last one is far from the other three, and the second original is as if never seen.
        "enrolment_1": figure(50.0, (10.0, 11.0, 12.0, 90.0), known=95.0, power=1.6, verdict=INCONCLUSIVE, resolution=2.0),
        "enrolment_5": figure(
            50.0, (10.0, 11.0, 12.0, 13.0), originals=[99.0, 20.0], known=59.5, power=3.8, verdict=INCONCLUSIVE
        ),
        # Originals show nothing of it.
        "sign_flip": figure(50.0, (0.0, 0.0, 0.0, 0.0), originals=[0.0, 0.0], known=95.0, power=7.6, verdict=STILL_KNOWN),
        "cka": figure(0.5, reason="a picture of where, no verdict"),
    }
    for entry in figures.values():
        entry["rho"] = 0.5
    text = audit_markdown(audited("L2*", request(**figures))[2])
    assert text.split("\n\n")[-1] == (
        "never-seen models, each by the others: 1 still known, 3 not enough evidence; "
        "models that know them: 1 still known, 1 not enough evidence."
    )


def test_strangers_have_a_table_of_their_own_beside_that_of_the_references():
    strangers = {"people": 30, "photos": [2, 2], "left_out": 0}
    second = request(verdict="like strangers", **{name: figure(reason="") for name in NAMES}) | {"strangers": strangers}
    first = audited("L2*")[2]["requests"][0]
    lines = overview([audited("L2*", first, second)])
    assert [line.split()[0] for line in lines if line[:2] in ("Ne", "St", "L2")] == ["Never", "L2*", "L2*"]
    assert lines[-1].split()[2:10] == ["50.0", "(23.3)"] * 4  # strangers are measured in each model anew
    assert "test faces, strangers in brackets, %" in "".join(lines)
    assert (
        "Request 1, compared with 30 strangers, no retrained references (2 + 2 photos of everybody): are its 2 people"
        in "".join(lines)
    )
    assert "Strangers" in cells(audit_markdown(audited("L2*", second)[2]))["Metric"]
    second["utility"]["references"] = []
    assert "top-1 accuracy 95.00 → 90.00 (–)" in audit_markdown(audited("L2*", second)[2])
    judged = {name: figure(verdict=STILL_KNOWN, known=90.0, rho=0.4, z=5.0, power=9.0) for name in NAMES}
    compared = cells(comparison_markdown([audited("L2*", request(**judged) | {"strangers": strangers})]))
    assert compared["L2*"][1] == "50.0 ▲ (23.3)" and "Never seen" not in compared


def test_h_is_of_the_requests_own_task():
    own, later = request(sign_flip=figure()), request(1, 2, sign_flip=figure())
    lines = overview([audited("L2*", own, later)])
    assert [line.split()[1] for line in lines if line.startswith("L2*")] == ["80.00", "–"]
