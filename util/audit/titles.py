"""Figures' keys in plain words."""

from util.audit import BESIDE_STRANGERS, FIGURES


def title_of(key: str) -> str:
    titles = {
        key: title for figure in (*FIGURES.values(), *BESIDE_STRANGERS.values()) for key, title in figure.titles.items()
    }
    return titles.get(key) or f"read after {key.removeprefix('probe_').replace('_', ' ')} by a linear probe"
