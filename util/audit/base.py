"""What a metric of the audit is: how much of the forgotten people a model still knows."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

from util.audit.inputs import AuditedModel, AuditTask
from util.audit.statistics import Statistic

FAMILIES = ("re-identification", "verification", "membership", "relearning")  # a verdict rests on several


@dataclass
class Measurement:
    """What a metric found in one model.

    statistics: by key, a function of the forgotten identities' weights, or in a few words why there is none.
    curves:     by name, what can be drawn of it, as JSON can hold it.
    """

    statistics: dict[str, Statistic | str]
    curves: dict[str, Any] = field(default_factory=dict)


class AuditMetric(ABC):
    """Subclass, override `measure`, and register in `util/audit/__init__.py`."""

    name: ClassVar[str]
    family: ClassVar[str]  # one of FAMILIES; "" where it is not judged
    titles: ClassVar[dict[str, str]]  # by key, in plain words
    # The originals show nothing of such a key: another key of theirs sets the scale of ρ, key → other.
    scale_from: ClassVar[dict[str, str]] = {}
    # Keys of what goes wrong with the person's faces: those who know the person show less of it.
    lower_if_known: ClassVar[frozenset[str]] = frozenset()

    def unmeasured(self) -> dict:
        """What audit.json says of one of its keys where there is nothing to say."""
        nothing = dict.fromkeys(("value", "interval", "known", "delta", "z", "p", "rho", "power", "significant", "verdict"))
        return {"family": self.family} | nothing | {"references": [], "originals": []}

    @abstractmethod
    def measure(self, audited: AuditedModel, task: AuditTask) -> Measurement:
        """All keys of the metric, in percent: more is more of the person, but for those in `lower_if_known`."""
