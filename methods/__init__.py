"""How a model forgets: one file a method, and this registry."""

from methods.base import Method
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
from methods.scrub import SCRUB, SCRUBS
from util.runtime.errors import UsageError

# In the order of the paper's tables.
METHODS: dict[str, type[Method]] = {
    method.name: method for method in (L2, EWC, MAS, LwF, DER, DERpp, FDR, SCRUB, SCRUBS, LIRF, Retrain, GSLoRA, GSLoRApp)
}


def method_class(name: str) -> type[Method]:
    if name not in METHODS:
        raise UsageError(f"unknown method {name!r}; choose from {', '.join(METHODS)}")
    return METHODS[name]
