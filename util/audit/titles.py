"""The metrics' keys in words: the field's terms."""

from collections import ChainMap

from util.audit import AUDIT_METRICS, STRANGER_METRICS


def title_of(key: str) -> str:
    titles = ChainMap(*(metric.titles for metric in (*AUDIT_METRICS.values(), *STRANGER_METRICS.values())))
    return titles.get(key) or f"linear probe after {key.removeprefix('probe_').replace('_', ' ')}"
