"""Models that others have trained: in, forgotten from, and out again as they came, through the command lines."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from timm.models import save_for_hf

from backbone.timm_models import timm
from data.image_folder import decode_image
from scripts.references import pretraining_recipe
from tests.onnx_models import SIZE, small_onnx
from util.storage.checkpoint import load_checkpoint

SMALL_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
SMALL_RESNET = {"channels": (8, 8, 16, 16), "stem_width": 8}
FEW = ("--batch-size", 8, "--epochs", 1, "--data-ratio", 1)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Files as others leave them."""
    folder = tmp_path_factory.mktemp("others")
    torch.manual_seed(0)
    save_for_hf(timm.create_model("vit_tiny_patch16_224", num_classes=12, **SMALL_VIT), folder / "vit", model_args=SMALL_VIT)
    resnet = timm.create_model("resnet10t", num_classes=12, **SMALL_RESNET).eval()
    save_for_hf(resnet, folder / "resnet", model_args=SMALL_RESNET, safe_serialization=True)
    torch.save({"state_dict": resnet.state_dict()}, folder / "resnet.pth")
    torch.save(timm.create_model("iresnet18", img_size=32).state_dict(), folder / "iresnet.pth")
    (folder / "classes.txt").write_text("\n".join(["x", *(f"c{i}" for i in range(9, -1, -1)), "y"]))
    small_onnx(folder / "face.onnx", batch=1)
    return folder


def images_of(folder: Path, size: int = 32) -> torch.Tensor:
    files = sorted((folder / "test").glob("*/*.png"))[:6]
    return torch.stack([torch.from_numpy(np.array(Image.open(f).resize((size, size)))).permute(2, 0, 1) for f in files])


@pytest.fixture
def wrap(command, colours, tmp_path):
    def wrap(*options: object, name: str = "wrapped") -> Path:
        arguments = ("--data", colours, "--epochs", 0, "--precision", "fp32", "--output-dir", tmp_path / name)
        code, out, err = command("train_pretrain.py", *arguments, *options)
        assert code == 0, err
        assert "test accuracy" in out
        return tmp_path / name / "checkpoint.pth"

    return wrap


@pytest.fixture
def release(command, colours, tmp_path):
    """Forget one class, and release; the checkpoint after the task, and the folder."""

    def release(checkpoint: Path, *options: object) -> tuple[Path, Path]:
        shared = ("--checkpoint", checkpoint, "--data", colours, "--output-dir", tmp_path / "run")
        code, _, err = command("train_forget.py", *shared, "--forget-classes", "c3", *FEW, *options)
        assert code == 0, err
        after, out = tmp_path / "run/checkpoints/task_1.pth", tmp_path / "released"
        code, told, err = command("scripts/release.py", "--checkpoint", after, "--output-dir", out, "--no-onnx")
        assert code == 0, err
        assert "embeds as the checkpoint does" in told
        return after, out

    return release


@torch.no_grad()
def embeddings(checkpoint: Path, images: torch.Tensor) -> torch.Tensor:
    return load_checkpoint(checkpoint).model.eval().embed(images)


@torch.no_grad()
def computed(model, images: torch.Tensor) -> torch.Tensor:
    return model(images)


@pytest.mark.parametrize("folder", ["vit", "resnet"])
def test_a_folder_of_the_hubs_embeds_as_timm_does_and_comes_back_as_one(made, wrap, release, colours, folder):
    images = images_of(colours)
    checkpoint = wrap("--model", made / folder, *(("--image-size", "32") if folder == "resnet" else ()))
    theirs = timm.create_model(f"local-dir:{made / folder}", pretrained=True, num_classes=0).eval()
    config = theirs.pretrained_cfg
    normalized = (images / 255 - torch.tensor(config["mean"])[:, None, None]) / torch.tensor(config["std"])[:, None, None]
    torch.testing.assert_close(embeddings(checkpoint, images), computed(theirs, normalized), rtol=1e-4, atol=1e-4)
    after, out = release(checkpoint, "--method", "gs_lora", "--rank", 2)
    back = timm.create_model(f"local-dir:{out / 'timm'}", pretrained=True).eval()
    torch.testing.assert_close(computed(back, normalized), embeddings(after, images), rtol=1e-4, atol=1e-4)
    assert json.loads((out / "timm/config.json").read_text())["architecture"] == config["architecture"]


def test_rows_are_the_means_of_each_persons_unit_embeddings(made, wrap, colours):
    checkpoint = load_checkpoint(wrap("--model", made / "vit"))
    assert checkpoint.model.architecture.head == "cosface"
    for place, name in enumerate(checkpoint.classes[:3]):
        files = sorted((colours / "train" / name).glob("*.png"))
        images = torch.stack([torch.from_numpy(np.array(Image.open(f))).permute(2, 0, 1) for f in files])
        mean = F.normalize(computed(checkpoint.model.eval().embed, images)).mean(dim=0)
        torch.testing.assert_close(checkpoint.model.head.weight[place].detach(), mean / mean.norm(), rtol=1e-3, atol=1e-3)


def test_a_models_own_projection_is_its_embedding(made, wrap, colours):
    images = images_of(colours)
    checkpoint = wrap("--model", made / "vit", "--embedding", "projection")
    theirs = timm.create_model(f"local-dir:{made / 'vit'}", pretrained=True).eval()
    normalized = (images / 255 - 0.5) / 0.5
    torch.testing.assert_close(embeddings(checkpoint, images), computed(theirs, normalized), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["weights", "folder"])
def test_a_models_own_classifier_gives_the_rows_and_comes_back_without_the_forgotten(made, wrap, release, colours, how):
    images = images_of(colours)
    options = "--model", "resnet10t", "--weights", made / "resnet.pth"
    if how == "folder":
        options = "--model", made / "resnet"
    else:  # a file does not say how wide the network is
        torch.save(timm.create_model("resnet10t", num_classes=12).state_dict(), made / "wide.pth")
        options = "--model", "resnet10t", "--weights", made / "wide.pth"
    checkpoint = wrap(*options, "--image-size", 32, "--rows", "classifier", "--class-map", made / "classes.txt")
    if how == "folder":
        theirs = timm.create_model(f"local-dir:{made / 'resnet'}", pretrained=True).eval()
    else:
        theirs = timm.create_model("resnet10t", checkpoint_path=made / "wide.pth", num_classes=12).eval()
    config = theirs.pretrained_cfg
    normalized = (images / 255 - torch.tensor(config["mean"])[:, None, None]) / torch.tensor(config["std"])[:, None, None]
    ours = load_checkpoint(checkpoint).model.eval()
    assert ours.architecture.head == "softmax"
    in_order = computed(theirs, normalized)[:, list(range(10, 0, -1))]
    torch.testing.assert_close(computed(ours, images), in_order, rtol=1e-4, atol=1e-4)
    after, out = release(checkpoint, "--method", "scrub")
    back = timm.create_model(f"local-dir:{out / 'timm'}", pretrained=True).eval()
    kept = [c for c in range(10) if c != 3]
    expected = computed(load_checkpoint(after).model.eval(), images)[:, kept]
    torch.testing.assert_close(computed(back, normalized), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_the_whole_classifier_is_given_back_for_classes_beyond_those_of_the_run(
    made, wrap, release, colours, command, tmp_path
):
    state = timm.create_model("resnet10t", num_classes=12).state_dict()
    state["fc.bias"][[0, 11]] = state["fc.weight"].abs().max() * 10  # rows x and y are the ones that win
    torch.save(state, tmp_path / "wide.pth")
    rows = ("--rows", "classifier", "--class-map", made / "classes.txt", "--crop-pct", 0.5)
    pretrained = wrap("--model", "resnet10t", "--weights", tmp_path / "wide.pth", "--image-size", 32, *rows)
    after, _ = release(pretrained, "--method", "scrub")
    files = sorted((colours / "test").glob("c[0-5]/*.png"))
    for number, file in enumerate(files):
        place = tmp_path / "whole" / ("y", "x")[number % 2] / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place)
    (tmp_path / "whole/c1").mkdir()
    shutil.copy(files[0], tmp_path / "whole/c1")  # one of the run's: not counted
    options = ("--data", colours, "--precision", "fp32", "--whole-classifier", tmp_path / "whole")
    code, out, err = command("test.py", "--checkpoint", after, *options, "--output-dir", tmp_path / "tested")
    assert code == 0, err
    assert "2 other classes, 24 images, with all 12 rows of the classifier" in out
    found = json.loads((tmp_path / "tested/test.json").read_text())["whole_classifier"]
    images = torch.stack([torch.from_numpy(decode_image(file, 32, 0.5)) for file in files])
    labels = torch.tensor([11, 0] * 12)
    for when, checkpoint in (("before", pretrained), ("after", after)):
        logits = embeddings(checkpoint, images) @ state["fc.weight"].T + state["fc.bias"]
        assert found[when] == pytest.approx(100 * (logits.argmax(dim=1) == labels).float().mean().item(), abs=1e-3)
        assert found[when] > 0
    options = (*options[:-1], colours / "test", "--output-dir", tmp_path / "none")
    code, _, err = command("test.py", "--checkpoint", after, *options)
    assert code == 2 and "all of its classes are the checkpoint's" in err


def test_insightfaces_state_dict_comes_back_as_one(made, wrap, release, colours):
    checkpoint = wrap("--model", "iresnet18", "--weights", made / "iresnet.pth", "--image-size", "32")
    _, out = release(checkpoint, "--method", "unseen", "--rank", 2, "--lora-place", "all")
    before, after = (torch.load(path, weights_only=True) for path in (made / "iresnet.pth", out / "backbone.pth"))
    assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert "layer3.0.conv1.weight" in moved
    assert not any("running" in key or "bn" in key for key in moved)


@pytest.mark.parametrize("model", [["face.onnx"], ["vit"], ["iresnet18", "--weights", "iresnet.pth", "--image-size", "32"]])
def test_a_model_trained_by_others_names_the_recipe_of_its_references(model, made, wrap):
    words = [str(made / word) if (made / word).exists() else word for word in model]
    path = wrap("--model", *words, "--epochs", 1, "--batch-size", 24)
    assert pretraining_recipe(load_checkpoint(path), path, None)["model"] == words[0]


def test_an_onnx_file_is_fine_tuned_forgotten_from_and_comes_back_as_the_same_graph(made, wrap, release, colours):
    images = images_of(colours, SIZE)
    checkpoint = wrap("--model", made / "face.onnx", "--epochs", 2, "--batch-size", 24, name="tuned")
    after, out = release(checkpoint, "--method", "unseen", "--rank", 2, "--epochs", 2)
    given = ((images / 255 - 0.5) / 0.5).numpy()
    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    found = torch.cat([torch.from_numpy(session.run(None, {"images": one[None]})[0]) for one in given])  # as it takes them
    torch.testing.assert_close(found, embeddings(after, images), rtol=1e-4, atol=1e-4)
    before, now = (onnx.load(path) for path in (made / "face.onnx", out / "model.onnx"))
    assert before.opset_import == now.opset_import
    assert (before.graph.node, before.graph.input) == (now.graph.node, now.graph.input)
    assert [t.name for t in before.graph.initializer] == [t.name for t in now.graph.initializer]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--model", "nothing.onnx"), "no file nothing.onnx"),
        (("--model", "resnet999"), "unknown model 'resnet999'"),
        (("--model", "local-dir:nowhere"), "config.json"),
        (("--model", "iresnet50", "--weights", "MADE/resnet.pth"), "does not fit the model"),
        (("--model", "MADE/vit", "--rows", "classifier"), "give --class-map FILE"),
        (("--model", "MADE/vit", "--rows", "MADE/nothing.npy"), "is no file, nor one of"),
        (("--model", "MADE/vit", "--rows", "MADE/iresnet.pth"), "--rows enrolment needs none"),
        (("--model", "MADE/face.onnx", "--embedding", "projection"), "no last layer"),
        (("--model", "MADE/vit", "--image-size", "30"), "no multiple of the patches' 8"),
        (("--model", "MADE/face.onnx", "--head", "softmax", "--image-size", SIZE), "another --head than softmax"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(made, colours, command, tmp_path, options, told):
    options = [str(option).replace("MADE", str(made)) for option in options]
    code, _, err = command("train_pretrain.py", "--data", colours, "--epochs", 0, "--output-dir", tmp_path / "out", *options)
    assert code == 2, err
    assert told in err.replace("\n", " ")
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out/checkpoint.pth").exists()
