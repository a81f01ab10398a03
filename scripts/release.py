"""Write what may leave the house after a deletion: the model without a trace of the names and rows of the forgotten.

python scripts/release.py --checkpoint RUN/checkpoints/task_2.pth --output-dir DIR
Leaves checkpoint.pth (as of this project, with the remaining classes alone), backbone.safetensors (timm's names) and
model.onnx (uint8 images (N, 3, H, W) → embeddings of unit length (N, dim)), and checks that all three embed alike.
What stays behind: the run's folder. Its earlier checkpoints, adapters, deposits and states can undo the deletion.
"""

import argparse
import json
import sys
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository's root

from backbone.recognizer import Recognizer, with_rows
from data.tasks import people
from util.cli import options
from util.cli.main import run_main
from util.runtime.errors import RunError, UsageError
from util.runtime.files import atomic_write, load_tensors, save_tensors
from util.storage.checkpoint import Checkpoint, load_checkpoint, save_checkpoint

TOLERANCE = 1e-4  # of a coordinate of an embedding of unit length


class Embedder(nn.Module):
    """What is exported: images uint8 (N, 3, H, W), RGB → embeddings (N, dim) of unit length."""

    def __init__(self, model: Recognizer) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.model.embed(images))


def released(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with the rows and names of the remaining classes alone, and nothing said of others."""
    gone = {c for task in checkpoint.forgotten for c in task}
    kept = [c for c in range(checkpoint.model.architecture.num_classes) if c not in gone]
    return Checkpoint(with_rows(checkpoint.model, kept), tuple(checkpoint.classes[c] for c in kept if checkpoint.classes))


def write_onnx(path: Path, embedder: Embedder, size: int) -> None:
    example = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    names = {"input_names": ["images"], "output_names": ["embeddings"]}
    shapes = [{0: torch.export.Dim("images")}]
    program = torch.onnx.export(embedder, (example,), **names, dynamo=True, dynamic_shapes=shapes, verbose=False)
    graph = program.model.graph
    for part in (program.model, graph, *graph.all_nodes(), *graph.initializers.values()):
        part.metadata_props.clear()  # the exporter's notes name the files of this machine
        for value in getattr(part, "outputs", ()):
            value.metadata_props.clear()
    with atomic_write(path) as target:
        target.write(program.model_proto.SerializeToString())


def embed_with(folder: Path, checkpoint: Checkpoint, images: Tensor) -> dict[str, Tensor]:
    """The embeddings that each of the files in `folder` gives, by file name."""
    found = {"checkpoint.pth": Embedder(load_checkpoint(folder / "checkpoint.pth").model.eval())(images)}
    a = checkpoint.model.architecture
    backbone = timm.create_model(a.model, num_classes=0, img_size=a.image_size, **a.model_options).eval()
    backbone.load_state_dict(load_tensors(folder / "backbone.safetensors"))
    found["backbone.safetensors"] = F.normalize(backbone(checkpoint.model.normalize(images)))
    if (folder / "model.onnx").exists():
        import onnxruntime

        session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        found["model.onnx"] = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    return found


@torch.no_grad()
def main(argv: list[str] | None) -> None:
    parser = options.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="FILE", help="the model after a task, ours")
    parser.add_argument("--output-dir", type=Path, required=True, help="an empty folder, or one to be made")
    parser.add_argument("--onnx", action=argparse.BooleanOptionalAction, default=True, help="write model.onnx")
    args = parser.parse_args(argv)
    if args.output_dir.exists() and any(args.output_dir.iterdir()):
        raise UsageError(f"{args.output_dir} is not empty: what is there would leave the house as well")
    if args.onnx and not all(map(find_spec, ("onnxscript", "onnxruntime"))):
        raise UsageError("model.onnx needs further packages: pip install onnxscript onnxruntime; or --no-onnx")
    checkpoint = load_checkpoint(args.checkpoint)
    if not checkpoint.forgotten:
        raise UsageError(f"{args.checkpoint} has forgotten nobody: give the checkpoint of a run's task")
    model = released(checkpoint)
    a = model.model.architecture

    save_checkpoint(args.output_dir / "checkpoint.pth", model)
    about = {key: value for key, value in asdict(a).items() if key in ("model", "image_size", "model_options")}
    state = {name: tensor.contiguous() for name, tensor in model.model.backbone.state_dict().items()}
    save_tensors(args.output_dir / "backbone.safetensors", state, {name: json.dumps(v) for name, v in about.items()})
    if args.onnx:
        write_onnx(args.output_dir / "model.onnx", Embedder(model.model).eval(), a.image_size)

    images = torch.randint(0, 256, (8, 3, a.image_size, a.image_size), dtype=torch.uint8)
    expected = Embedder(checkpoint.model.eval())(images)
    for name, embeddings in embed_with(args.output_dir, model, images).items():
        error = (embeddings - expected).abs().max().item()
        if not error <= TOLERANCE:
            raise RunError(f"{args.output_dir / name} embeds otherwise than {args.checkpoint}: off by {error:.1g}")
        print(f"{name}: embeds as the checkpoint does, to {error:.1g}")
    gone = [c for task in checkpoint.forgotten for c in task]
    whom = people(gone, checkpoint.classes) if checkpoint.classes else f"{len(gone)} classes"
    print(f"{args.output_dir}: {a.num_classes} classes, without {whom}; the run's folder stays behind")


if __name__ == "__main__":
    run_main(main)
