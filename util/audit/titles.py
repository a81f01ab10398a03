"""The metrics' keys in words: the field's terms."""

from util.audit import BESIDE_STRANGERS, FIGURES


def title_of(key: str) -> str:
    titles = {
        key: title for figure in (*FIGURES.values(), *BESIDE_STRANGERS.values()) for key, title in figure.titles.items()
    }
    return titles.get(key) or f"linear probe after {key.removeprefix('probe_').replace('_', ' ')}"
