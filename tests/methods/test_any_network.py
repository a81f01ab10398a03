"""Every method on networks that are no plain vision transformers."""

import pytest
import torch

from backbone.onnx_graph import read_onnx
from backbone.recognizer import Architecture, Recognizer, build_recognizer, to_device
from methods import METHODS
from tests.onnx_models import SIZE, small_onnx
from util.runtime.files import save_tensors
from util.runtime.hardware import Hardware
from util.training.engine import Trainer
from util.training.monitor import Monitor

RANK = dict.fromkeys(("gs_lora", "gs_lora_pp", "unseen"), ("--rank", "2"))
SMALL_NEXT = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}
SMALL_SWIN = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1), "window_size": 4, "patch_size": 1}
SMALL_VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}
KINDS = {
    "vit": lambda path: Architecture("vit_tiny_patch16_224", 6, 16, model_options=SMALL_VIT),
    "swin": lambda path: Architecture("swin_tiny_patch4_window7_224", 6, 16, model_options=SMALL_SWIN),
    "convnext": lambda path: Architecture("convnext_atto", 6, 32, model_options=SMALL_NEXT),
    "resnet": lambda path: Architecture("resnet10t", 6, 32, model_options={"channels": (8, 8, 16, 16), "stem_width": 8}),
    "onnx": lambda path: Architecture("model.onnx", 6, SIZE, graph=read_onnx(small_onnx(path))[0]),
}


def recognizer(kind: str, path) -> Recognizer:
    torch.manual_seed(0)
    return build_recognizer(KINDS[kind](path / "model.onnx"))


# GPUs compute in bf16, most CPUs in fp32; the three that measure importances batch their gradients.
@pytest.mark.parametrize(
    ("name", "bf16"), [*((name, True) for name in METHODS), *((name, False) for name in ("ewc", "mas", "ssd", "gs_lora"))]
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_method_runs_on_it(name, bf16, kind, method_arguments, make_images, make_tasks, tmp_path):
    cpu = Hardware(torch.device("cpu"), bf16)
    model = to_device(recognizer(kind, tmp_path), cpu)
    images = make_images(image_size=model.architecture.image_size)
    tasks, args = make_tasks(images, 1), method_arguments(name, "--epochs", "1", *RANK.get(name, ()))
    method = METHODS[name](args, cpu)
    method.check(model, tasks, images)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    method.begin_run(model, tasks, images)
    method.begin_task(model, tasks[0], images, 1)
    trainer = Trainer(model, method, tasks[0])
    with Monitor(None, "test", "test", 1) as monitor:
        trainer.train(monitor, lambda trainer: None, lambda trainer: None)
    for kind_of_file, tensors in method.end_task(model).files.items():
        save_tensors(tmp_path / kind_of_file, tensors, {})
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert any(not torch.equal(after[key], before[key]) for key in after)
    moved = [key for key in after if "running_" in key and not torch.equal(after[key], before[key])]
    assert bool(moved) == (name == "retrain" and any("running_" in key for key in after))
    assert all(tensor.isfinite().all() for tensor in after.values())
