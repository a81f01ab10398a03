"""Does the model still know the person? One file a figure, and this registry, in the order of the tables."""

from util.audit.apart import Apart
from util.audit.base import Figure
from util.audit.cka import CKA
from util.audit.enrolment import Enrolment
from util.audit.membership_images import MembershipOfImages
from util.audit.membership_person import MembershipOfPerson
from util.audit.probe import Probe
from util.audit.readout import Readout
from util.audit.relearning import Relearning
from util.audit.verification import Verification

FIGURES: dict[str, Figure] = {
    figure.name: figure()
    for figure in (Readout, Enrolment, Verification, Probe, MembershipOfImages, MembershipOfPerson, Relearning, CKA)
}
# Of these, the ones that look at embeddings and rows alone. Strangers are whom MembershipOfPerson tells the forgotten from.
BESIDE_STRANGERS: dict[str, Figure] = {name: FIGURES[name] for name in ("readout", "enrolment", "verification")}
BESIDE_STRANGERS |= {"membership_images": FIGURES["membership_images"], "membership_person": Apart()}
