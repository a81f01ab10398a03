"""The metrics' keys in words: the field's terms."""

from util.audit import AUDIT_METRICS, STRANGER_METRICS


def title_of(key: str) -> str:
    titles = {
        key: title
        for metric in (*AUDIT_METRICS.values(), *STRANGER_METRICS.values())
        for key, title in metric.titles.items()
    }
    return titles.get(key) or f"linear probe after {key.removeprefix('probe_').replace('_', ' ')}"
