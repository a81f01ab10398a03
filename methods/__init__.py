"""How a model forgets: one file a method, and this registry."""

from methods.base import Method
from methods.gs_lora import GSLoRA
from util.errors import UsageError

METHODS: dict[str, type[Method]] = {method.name: method for method in (GSLoRA,)}


def method_class(name: str) -> type[Method]:
    if name not in METHODS:
        raise UsageError(f"unknown method {name!r}; choose from {', '.join(METHODS)}")
    return METHODS[name]
