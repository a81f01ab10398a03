"""The metrics of continual forgetting as pure functions; all accuracies in percent."""

from torch import Tensor


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
