"""From metrics to the verdict on a request, and whether that verdict is right where the truth is known."""

from collections import Counter
from collections.abc import Sequence

from util.audit import AUDIT_METRICS
from util.audit.base import FAMILIES
from util.audit.statistics import HIGHLY_SIGNIFICANT, INCONCLUSIVE, OVER_FORGOTTEN, POWER, STILL_KNOWN, WITHIN, compare

AS_IF_NEVER_SEEN, NOT_ENOUGH = "as if never seen", "not enough evidence"
LIKE_STRANGERS, UNLIKE_STRANGERS = "like strangers", "unlike strangers"
VERDICTS = (STILL_KNOWN, OVER_FORGOTTEN, UNLIKE_STRANGERS, AS_IF_NEVER_SEEN, LIKE_STRANGERS, NOT_ENOUGH)
STRANGER_VERDICTS = {AS_IF_NEVER_SEEN: LIKE_STRANGERS, OVER_FORGOTTEN: UNLIKE_STRANGERS}
MIN_FAMILIES = 3  # families of metrics that must show that nothing is left

LOWER_IF_KNOWN = frozenset().union(*(metric.lower_if_known for metric in AUDIT_METRICS.values()))
BORROWED_SCALE = {key for metric in AUDIT_METRICS.values() for key in metric.scale_from}


def judge(metrics: dict[str, dict], strangers: dict | None = None) -> dict:
    """The verdict on a request from its `metrics` in audit.json; against `strangers` it has names of its own.

    verdict:   still known if two metrics say so, or one that is highly significant; else over-forgotten likewise; else as if
               never seen, if no metric says either, and in MIN_FAMILIES families one with power is within the margin; else
               there is not enough evidence. Beside strangers what is significant is highly so: one metric suffices.
    families:  by name, the first of these that a metric of it says: still known, over-forgotten, within, inconclusive.
    tally:     {"within", "significantly_off" (of these), "with_power"}, numbers of metrics.
    undecided: {"figure", "rho"} of the metric that is farthest on the way back without deciding, or None.
    """
    counted = {key: entry for key, entry in metrics.items() if counts(key, entry)}
    found = {name: {e["verdict"] for e in counted.values() if e["family"] == name} for name in FAMILIES}
    order = (STILL_KNOWN, OVER_FORGOTTEN, WITHIN, INCONCLUSIVE)
    families = {name: next(verdict for verdict in order if verdict in given) for name, given in found.items() if given}
    faults = [fault for fault in (STILL_KNOWN, OVER_FORGOTTEN) if any(fault == e["verdict"] for e in counted.values())]
    verdict = next((fault for fault in faults if _shown(fault, counted)), NOT_ENOUGH)
    if not faults and [*families.values()].count(WITHIN) >= MIN_FAMILIES:
        verdict = AS_IF_NEVER_SEEN
    open_questions = {INCONCLUSIVE, STILL_KNOWN} - {verdict}
    undecided = {key: e["rho"] for key, e in counted.items() if e["verdict"] in open_questions and e["power"] >= 1}
    farthest = max(undecided, key=undecided.get, default=None)
    return {
        "verdict": STRANGER_VERDICTS.get(verdict, verdict) if strangers else verdict,
        "families": families,
        "tally": {
            "within": sum(entry["verdict"] == WITHIN for entry in counted.values()),
            "significantly_off": sum(significantly_off(*metric) for metric in counted.items()),
            "with_power": sum(entry["power"] >= POWER for entry in counted.values()),
        },
        "undecided": farthest and {"figure": farthest, "rho": undecided[farthest]},
    }


def _shown(fault: str, metrics: dict[str, dict]) -> bool:
    """Is a fault that a metric finds one of the request? In every fourth request one of a dozen metrics is off by chance."""
    found = [entry["p"] for entry in metrics.values() if entry["verdict"] == fault]
    return len(found) > 1 or min(found) < HIGHLY_SIGNIFICANT


def counts(key: str, entry: dict) -> bool:
    """Is a metric evidence? One that can find but one fault is none where it does not find it: an inverted ranking, which
    originals do not have either, can say still known, and a metric that is lower if known over-forgotten."""
    only = STILL_KNOWN if key in BORROWED_SCALE else OVER_FORGOTTEN if key in LOWER_IF_KNOWN else entry["verdict"]
    return bool(entry["verdict"]) and entry["verdict"] == only


def significantly_off(key: str, entry: dict) -> bool:
    """Is a metric that is evidence within the margin, and yet farther from the references than chance explains?"""
    return counts(key, entry) and entry["verdict"] == WITHIN and entry["significant"]


def calibration(requests: Sequence[dict]) -> dict[str, Counter]:
    """The verdicts where the truth is known: on references, each judged by the others, on originals, and on groups of
    strangers; of `requests` in audit.json, those of several models on the same people beside the same references once."""
    found = {"references": Counter(), "originals": Counter(), "strangers": Counter()}
    retrained = [request for request in requests if not request.get("strangers")]
    for request in {(*r["forget"], *r["references"]): r for r in retrained}.values():
        for group in ("references", "originals"):
            found[group] += _verdicts_on(request, group)
    for request in (request for request in requests if request.get("strangers")):
        found["strangers"] += _verdicts_on(request, "references")
    return found


def _verdicts_on(request: dict, group: str) -> Counter:
    """On the references or originals of a request, each as if it were the model that was to forget."""
    found, judged = Counter(), {key: entry for key, entry in request["figures"].items() if entry["verdict"]}
    for place in range(len(next(iter(judged.values()))[group]) if judged else 0):
        metrics = {}
        for key, entry in judged.items():
            never = [value for i, value in enumerate(entry["references"]) if (group, place) != ("references", i)]
            rest = entry["resolution"], key in LOWER_IF_KNOWN, entry.get("independent")
            metrics[key] = {"family": entry["family"]} | compare(entry[group][place], never, [entry["known"]], *rest)
        found[judge(metrics, request.get("strangers"))["verdict"]] += 1
    return found
