"""Does the model still know the person? One file a metric, and this registry, in the order of the tables."""

from collections import ChainMap

from util.audit.base import AuditMetric
from util.audit.cka import CKA
from util.audit.enrolment import Enrolment
from util.audit.membership_images import MembershipOfImages
from util.audit.membership_person import Apart, MembershipOfPerson
from util.audit.probe import Probe
from util.audit.readout import Readout
from util.audit.relearning import Relearning
from util.audit.verification import Verification

AUDIT_METRICS: dict[str, AuditMetric] = {
    metric.name: metric()
    for metric in (Readout, Enrolment, Verification, Probe, MembershipOfImages, MembershipOfPerson, Relearning, CKA)
}
# Of these, the ones that look at embeddings and rows alone. Strangers are whom MembershipOfPerson tells the forgotten from.
STRANGER_METRICS: dict[str, AuditMetric] = {name: AUDIT_METRICS[name] for name in ("readout", "enrolment", "verification")}
STRANGER_METRICS |= {"membership_images": AUDIT_METRICS["membership_images"], "membership_person": Apart()}


def title_of(key: str) -> str:
    """A metric's key in words: the field's terms."""
    titles = ChainMap(*(metric.titles for metric in (*AUDIT_METRICS.values(), *STRANGER_METRICS.values())))
    return titles.get(key) or f"linear probe after {key.removeprefix('probe_').replace('_', ' ')}"
