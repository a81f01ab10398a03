"""Write the files to ship: the model, after a deletion without the forgotten people's names and head rows.

python scripts/release.py --checkpoint RUN/checkpoints/task_2.pth --output-dir DIR
Leaves checkpoint.pth (as of this project, with the remaining classes alone), and the model in the form that it came in:
timm/         config.json and model.safetensors, for timm.create_model("local-dir:DIR/timm", pretrained=True)
backbone.pth  of insightface's networks: the state dict
model.onnx    of an ONNX model, the same graph with other weights; of others, uint8 images (N, 3, H, W) → embeddings of
              unit length (N, dim)
All are checked to embed alike. Do not ship the run's folder: its earlier checkpoints, adapters, deposits and states can undo
the deletion.
"""

import argparse
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository's root

from backbone import insightface
from backbone.heads import Softmax
from backbone.onnx_graph import write_onnx_weights
from backbone.recognizer import Recognizer, build_backbone, with_rows
from data.pairs import load_pairs
from data.tasks import name_list
from util.cli import options
from util.cli.main import run_main
from util.evaluation.verification import pair_benchmark
from util.runtime.errors import RunError, UsageError, one_line
from util.runtime.files import atomic_write, save_tensors, write_json
from util.runtime.hardware import Hardware
from util.storage.checkpoint import Checkpoint, load_checkpoint, save_checkpoint, torch_load, torch_save

TOLERANCE = 1e-4  # of a coordinate of an embedding of unit length


class Embedder(nn.Module):
    """What is exported: images uint8 (N, 3, H, W), RGB → embeddings (N, dim) of unit length."""

    def __init__(self, model: Recognizer) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.model.embed(images))


def without_forgotten(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with the rows and names of the remaining classes alone, and nothing said of others."""
    forgotten = {c for task in checkpoint.forgotten for c in task}
    kept = [c for c in range(checkpoint.model.architecture.num_classes) if c not in forgotten]
    return Checkpoint(with_rows(checkpoint.model, kept), tuple(checkpoint.classes[c] for c in kept if checkpoint.classes))


def write_timm(folder: Path, model: Recognizer) -> None:
    """The backbone, and a softmax head as its classifier, as Hugging Face's hub has timm's models."""
    a, backbone = model.architecture, model.backbone
    state, own = dict(backbone.state_dict()), backbone.pretrained_cfg
    options = {"num_classes": 0} | a.model_options
    if isinstance(model.head, Softmax) and own.get("classifier"):
        options["num_classes"] = a.num_classes
        state |= {f"{own['classifier']}.{name}": rows for name, rows in model.head.state_dict().items()}
    pixels = {key: a.pixels.get(key, own.get(key)) for key in ("mean", "std", "crop_pct", "interpolation")}
    cfg = pixels | {"input_size": [3, a.image_size, a.image_size], "num_classes": options["num_classes"]}
    of_network = ("fixed_input_size", "classifier", "first_conv", "pool_size")
    cfg |= {key: own[key] for key in of_network if own.get(key) is not None}
    about = {"architecture": a.model, "num_classes": options.pop("num_classes"), "num_features": backbone.num_features}
    write_json(folder / "config.json", about | {"pretrained_cfg": cfg, "model_args": options})
    save_tensors(folder / "model.safetensors", state)


def write_onnx(path: Path, embedder: Embedder, size: int) -> None:
    example = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    names = {"input_names": ["images"], "output_names": ["embeddings"]}
    shapes = [{0: torch.export.Dim("images")}]
    try:
        program = torch.onnx.export(embedder, (example,), **names, dynamo=True, dynamic_shapes=shapes, verbose=False)
    except Exception as error:  # of the exporter, which has many
        raise RunError(f"torch cannot export this model: {one_line(error)}; --no-onnx leaves model.onnx out") from None
    model = program.model_proto
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output, *graph.value_info):
        part.ClearField("metadata_props")  # the exporter's notes name the files of this machine
    with atomic_write(path) as file:
        file.write(model.SerializeToString())


def write_files(folder: Path, checkpoint: Checkpoint, onnx: bool, images: Tensor) -> dict[str, Tensor]:
    """The checkpoint, and its backbone in the form that it came in; `onnx`: as model.onnx too.

    Returns the embeddings of unit length that each of the files gives of the `images`, by file name.
    """
    model = checkpoint.model
    a, normalized = model.architecture, model.normalize(images)
    save_checkpoint(folder / "checkpoint.pth", checkpoint)
    found = {"checkpoint.pth": load_checkpoint(folder / "checkpoint.pth").model.eval().embed(images)}
    if a.graph is not None:
        with atomic_write(folder / "model.onnx") as file:
            file.write(write_onnx_weights(model.backbone, a.graph).SerializeToString())
        found["model.onnx"] = run_onnx(folder / "model.onnx", model.backbone.as_given(normalized))
    elif a.model in insightface.MODELS:
        torch_save(folder / "backbone.pth", model.backbone.state_dict())
        backbone = build_backbone(a)
        backbone.load_state_dict(torch_load(folder / "backbone.pth"))
        found["backbone.pth"] = backbone.eval()(normalized)
    else:
        write_timm(folder / "timm", model)
        backbone = timm.create_model(f"local-dir:{folder / 'timm'}", pretrained=True).eval()
        if isinstance(model.head, Softmax):
            backbone.reset_classifier(0)
        found["timm"] = backbone(normalized)
    if onnx and a.graph is None:
        write_onnx(folder / "model.onnx", Embedder(model).eval(), a.image_size)
        found["model.onnx"] = run_onnx(folder / "model.onnx", images)
    return {name: F.normalize(embeddings.flatten(1)) for name, embeddings in found.items()}


def run_onnx(path: Path, images: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    taken = session.get_inputs()[0]
    images = images.half() if taken.type == "tensor(float16)" else images
    at_once = taken.shape[0] if isinstance(taken.shape[0], int) else len(images)
    outputs = [session.run(None, {taken.name: part.numpy()})[0] for part in images.split(at_once)]
    return torch.from_numpy(np.concatenate(outputs)).float()


@torch.no_grad()
def main(argv: list[str]) -> None:
    parser = options.Parser(__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="FILE", help="checkpoint of this project")
    parser.add_argument("--output-dir", type=Path, required=True, help="new or empty folder")
    parser.add_argument("--onnx", action=argparse.BooleanOptionalAction, default=True, help="model.onnx too (default: yes)")
    options.add_pairs(parser, "to measure the released model on")
    args = parser.parse_args(argv)
    if args.output_dir.exists() and any(args.output_dir.iterdir()):
        raise UsageError(f"{args.output_dir} is not empty: what is there would leave the house as well")
    if args.onnx and not all(map(find_spec, ("onnxscript", "onnxruntime"))):
        raise UsageError("model.onnx needs further packages: pip install onnxscript onnxruntime; or --no-onnx")
    checkpoint = load_checkpoint(args.checkpoint)
    if not checkpoint.forgotten:
        print(f"warning: {args.checkpoint} has forgotten nobody: of a deletion, release its task", file=sys.stderr)
    model = without_forgotten(checkpoint)
    a, recognizer = model.model.architecture, model.model.eval()
    pairs = load_pairs(args.pairs or [], a.image_size, None, a.crop_pct)
    unchecked = args.output_dir / ".unchecked"
    unchecked.mkdir(parents=True)
    try:
        images = torch.randint(0, 256, (8, 3, a.image_size, a.image_size), dtype=torch.uint8)
        expected = Embedder(checkpoint.model.eval())(images)
        for name, embeddings in write_files(unchecked, model, args.onnx, images).items():
            error = (embeddings - expected).abs().max().item()
            if not error <= TOLERANCE:
                message = f"{name} would embed otherwise than {args.checkpoint}: off by {error:.1g}"
                raise RunError(f"{message}; nothing is released")
            print(f"{name}: embeds as the checkpoint does, to {error:.1g}")
        for path in unchecked.iterdir():
            path.rename(args.output_dir / path.name)
    finally:
        shutil.rmtree(unchecked)
    for name, found in pair_benchmark(recognizer, pairs, Hardware(torch.device("cpu"), bf16=False)).items():
        print(f"{name}: {', '.join(f'{key} {value}' for key, value in found.items())}")
    forgotten = [c for task in checkpoint.forgotten for c in task]
    names = name_list(forgotten, checkpoint.classes) if checkpoint.classes else f"{len(forgotten)} classes"
    without = f", without {names}; the run's folder stays behind" if forgotten else ""
    print(f"{args.output_dir}: {a.num_classes} classes{without}")


if __name__ == "__main__":
    run_main(main)
