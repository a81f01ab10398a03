"""The metrics of continual forgetting; all in percent."""

from typing import NamedTuple

from torch import Tensor

MUCH_LOST = 10  # points of kept people's accuracy: what is left may be a network in ruins


class Metric(NamedTuple):
    title: str
    description: str
    more_is_better: bool
    colour: str

    @property
    def heading(self) -> str:
        return f"{self.title} {'↑' if self.more_is_better else '↓'}"


# By their keys in results.json, in the papers' order and with their titles.
METRICS = {
    "h_mean": Metric("H", "harmonic mean of Acc_r and the drop of Acc_f", True, "black"),
    "acc_remain": Metric("Acc_r", "remaining classes", True, "tab:blue"),
    "acc_forget": Metric("Acc_f", "classes forgotten in this task", False, "tab:red"),
    "acc_old": Metric("Acc_o", "classes forgotten earlier", False, "tab:orange"),
    "acc_missing": Metric("Acc_m", "remaining classes without training images", True, "tab:green"),
}
# Each is measured in two ways, told apart by the prefix of the key.
MARGINS = {
    "": "without margin: what a user of the model sees",
    "margin_": "with margin, as published: the true class must win by it",
}


def top1(correct: Tensor, chosen: Tensor) -> float | None:
    """Accuracy in % over the chosen images; None if there are none. Both bool (N,)."""
    count = int(chosen.sum())
    return 100 * int((correct & chosen).sum()) / count if count else None


def h_mean(acc_remain: float | None, acc_forget: float | None, acc_forget_before: float | None) -> float | None:
    """H = 2 · Acc_r · Drop / (Acc_r + Drop), Drop = Acc_f of the pre-trained model − Acc_f now (arXiv 2403.11530).

    A negative drop (nothing forgotten, something gained) counts as none: H is 0 then. None where an accuracy is.
    """
    if acc_remain is None or acc_forget is None or acc_forget_before is None:
        return None
    drop = max(0.0, acc_forget_before - acc_forget)
    return 2 * acc_remain * drop / (acc_remain + drop) if acc_remain + drop > 0 else 0.0
