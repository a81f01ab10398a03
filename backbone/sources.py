"""What a user calls a model: a name of timm's, a folder or a hub's repository in Hugging Face's layout, or an ONNX file."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from backbone.onnx_graph import read_onnx
from util.runtime.errors import UsageError, one_line

PIXELS = ("mean", "std")  # of timm's configurations
CHOSEN_HERE = ("num_classes", "img_size", "in_chans")  # of a saved model's arguments


@dataclass
class Source:
    """model, pixels, graph: as in `Architecture`. options: of timm.create_model. image_size: None where any will do.

    state: the backbone's state dict, where the model comes with one. weights: the file that holds it.
    """

    model: str
    image_size: int | None
    options: dict = field(default_factory=dict)
    pixels: dict = field(default_factory=dict)
    graph: Tensor | None = None
    state: dict[str, Tensor] | None = None
    weights: Path | None = None


def find_source(name: str) -> Source:
    """Raises UsageError where there is no such model."""
    from backbone.timm_models import timm

    if name.endswith(".onnx"):
        if not Path(name).is_file():
            raise UsageError(f"no file {name}: --model takes a name of timm's, a folder with config.json, or an ONNX file")
        graph, size, pixels, state = read_onnx(Path(name))
        return Source(Path(name).name, size, pixels=pixels, graph=graph, state=state, weights=Path(name))
    folder = name.removeprefix("local-dir:")
    if name.startswith("local-dir:") or (Path(folder) / "config.json").is_file():
        return _configured(name, *_config(folder, hub=False), weights=_weights_in(Path(folder)))
    if name.startswith(("hf-hub:", "hf_hub:")):
        found = _configured(name, *_config(name.partition(":")[2], hub=True))
        found.state = timm.create_model(name, pretrained=True).state_dict()
        return found
    if not timm.is_model(name.partition(".")[0]):
        raise UsageError(f"unknown model {name!r}; timm.list_models() names them all, an ONNX file ends in .onnx")
    return Source(name, timm.get_pretrained_cfg(name).input_size[-1])


def _config(place: str, hub: bool) -> tuple[dict, str, dict]:
    """The pretrained_cfg, architecture and model_args of a folder, or of a repository on Hugging Face's hub."""
    from timm.models import _hub  # of a folder, timm offers this nowhere else

    try:
        return _hub.load_model_config_from_hf(place) if hub else _hub.load_model_config_from_path(place)
    except Exception as error:  # a file that is missing or damaged; without a network, the hub's own
        raise UsageError(f"{place}: its config.json cannot be read as timm's: {one_line(error)}") from None


def _configured(name: str, config: dict, architecture: str, options: dict | None, weights: Path | None = None) -> Source:
    from backbone.timm_models import timm

    if not timm.is_model(architecture):
        raise UsageError(f"{name}: its config.json names {architecture!r}, which is no model of timm's")
    own = timm.get_pretrained_cfg(architecture, allow_unregistered=True)
    config = (own.to_dict() if own else {}) | config
    pixels = {key: json.loads(json.dumps(config[key])) for key in PIXELS if config.get(key) is not None}
    options = {key: value for key, value in (options or {}).items() if key not in CHOSEN_HERE}
    return Source(architecture, config["input_size"][-1], options, pixels, weights=weights)


def _weights_in(folder: Path) -> Path:
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return folder / name
    raise UsageError(f"{folder}: no model.safetensors beside config.json")
