"""timm, with the models of this project registered. It takes 2.7 s to import: functions do, and --help need not wait."""

import timm
from torch import nn

from backbone import face_transformer, insightface

MODELS = face_transformer.MODELS | insightface.MODELS
# timm looks for this name.
default_cfgs = timm.models.generate_default_cfgs({name: config for name, (_, _, config) in MODELS.items()})


def _register(name: str, network: type[nn.Module], arguments: dict) -> None:
    def create(pretrained: bool = False, **kwargs) -> nn.Module:
        return timm.models.build_model_with_cfg(network, name, pretrained, **arguments | kwargs)

    create.__name__ = name
    timm.models.register_model(create)


for name, (network, arguments, _) in MODELS.items():
    _register(name, network, arguments)
