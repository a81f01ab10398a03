"""What a figure of the audit is: it looks at a model in a scene and says what is still known there."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

from util.audit.statistics import Statistic
from util.audit.subject import Scene, Subject

FAMILIES = ("re-identification", "verification", "membership", "relearning")  # a verdict rests on several


@dataclass
class Measurement:
    """What a figure found in one model.

    statistics: by key, a function of the forgotten identities' weights, or in a few words why there is none.
    curves:     by name, what can be drawn of it, as JSON can hold it.
    """

    statistics: dict[str, Statistic | str]
    curves: dict[str, Any] = field(default_factory=dict)


class Figure(ABC):
    """Subclass, override `measure`, and register in `util/audit/__init__.py`."""

    name: ClassVar[str]
    family: ClassVar[str]  # one of FAMILIES; "" where it is not judged
    titles: ClassVar[dict[str, str]]  # by key, in plain words
    # The originals show nothing of such a key: as known counts what they show of another, key → other.
    known_by: ClassVar[dict[str, str]] = {}
    # Keys of what goes wrong with the person's faces: those who know the person show less of it.
    falling: ClassVar[frozenset[str]] = frozenset()

    @property
    def judged(self) -> bool:
        return bool(self.family)

    @abstractmethod
    def measure(self, subject: Subject, scene: Scene) -> Measurement:
        """All keys of the figure, in percent: more is more of the person, but for those in `falling`."""
