"""How a model forgets: one file a method, and this registry."""

from methods.bad_teacher import BadTeacher
from methods.base import Method
from methods.delete import DELETE
from methods.der import DER, DERpp
from methods.ewc import EWC
from methods.fdr import FDR
from methods.gs_lora import GSLoRA
from methods.gs_lora_pp import GSLoRApp
from methods.l2 import L2
from methods.lirf import LIRF
from methods.lwf import LwF
from methods.mas import MAS
from methods.retrain import Retrain
from methods.salun import SalUn
from methods.scrub import SCRUB, SCRUBS
from methods.spotter import Spotter
from methods.ssd import SSD
from methods.unseen import Unseen
from util.runtime.errors import UsageError

# In the order of the papers' tables, then those that they do not have.
PUBLISHED = (L2, EWC, MAS, LwF, DER, DERpp, FDR, SCRUB, SCRUBS, LIRF, Retrain, GSLoRA, GSLoRApp)
FURTHER = (SSD, SalUn, BadTeacher, DELETE, Spotter, Unseen)
METHODS: dict[str, type[Method]] = {method.name: method for method in (*PUBLISHED, *FURTHER)}


def method_class(name: str) -> type[Method]:
    if name not in METHODS:
        raise UsageError(f"unknown method {name!r}; choose from {', '.join(METHODS)}")
    return METHODS[name]
