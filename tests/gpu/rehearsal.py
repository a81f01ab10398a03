"""What trains and measures, on the device of `device.py`; test_rehearsal.py runs this in a process of its own."""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from sklearn.manifold import TSNE

import train_forget
from backbone.heads import HEADS
from backbone.recognizer import to_device
from data.batches import batches
from methods import METHODS, PUBLISHED
from tests.conftest import SMALL, coloured_images, drawn_tasks, results_of, small_recognizer, write_folder
from tests.gpu import device
from util.runtime import hardware
from util.runtime.hardware import Hardware
from util.storage.checkpoint import load_checkpoint
from util.training.engine import Trainer

CPU, DEVICE = torch.device("cpu"), device.start()
HARDWARE = Hardware(DEVICE, bf16=False, fused_attention=True, fused_optimizer=True)
PROTOCOL = ("--num-tasks", 2, "--data-ratio", 1, "--batch-size", 12, "--epochs", 1)
SHARED = ("--images", "device", "--precision", "fp32", *PROTOCOL)
# Of further paths through a method or the loop. SCRUB's first gradient is rounding alone, and Adam makes a whole step of it.
OWN = {"der": ("--clip-grad", 1), "gs_lora": ("--sparsity-warmup-epochs", 0), "gs_lora_pp": ("--ema-start", 0)}
OWN |= {"retrain": ("--passes", 2), "unseen": ("--passes", 1, "--visits", 1)}
OWN |= dict.fromkeys(("scrub", "scrub_s"), ("--lr", 1e-5))


@pytest.fixture(autouse=True)
def no_wait_in_an_epoch(monkeypatch):
    batches_left = Trainer.batches_left

    def watched(trainer):
        with device.no_waits():  # until the loop over the batches has ended
            yield from batches_left(trainer)

    monkeypatch.setattr(Trainer, "batches_left", watched)
    monkeypatch.setitem(hardware.WORTH_COMPILING, device.NAME, math.inf)
    monkeypatch.setattr("util.report.figures.run_figure", lambda comparison: Figure((1, 1)))  # a third of the time


@pytest.fixture
def run(command, monkeypatch):
    """Run a script, by default on the device."""

    def run(script: str, *words: object, where: torch.device = DEVICE) -> str:
        monkeypatch.setattr(hardware, "_device", lambda name: where)
        code, out, err = command(script, *words)
        assert code == 0, err
        return out

    return run


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Path:
    train, test = coloured_images(8, 6, 32), coloured_images(8, 3, 32, seed=1)
    return write_folder(tmp_path_factory.mktemp("data") / "small", train, test)


@pytest.fixture
def pretrain(run, small, tmp_path_factory):
    """Pre-train, once a session for each name."""

    def pretrain(name: str, *words: object, epochs: int = 15, where: torch.device = DEVICE) -> Path:
        folder = tmp_path_factory.getbasetemp() / name
        if not (folder / "checkpoint.pth").exists():
            options = (*SMALL, "--epochs", epochs, "--batch-size", 12, "--lr", "2e-3", "--precision", "fp32", *words)
            run("train_pretrain.py", "--data", small, *options, "--output-dir", folder, where=where)
        return folder / "checkpoint.pth"

    return pretrain


@pytest.fixture
def forget(run, small, pretrain, tmp_path_factory):
    """Forget with a method in two tasks, once a session for each method, place and preset."""

    def forget(method: str, *words: object, where: torch.device = DEVICE) -> Path:
        folder = tmp_path_factory.getbasetemp() / "-".join(map(str, (method, where.type, *words)))
        if not (folder / "figure.png").exists():
            paths = ("--checkpoint", pretrain("rehearsed"), "--data", small, "--output-dir", folder)
            run("train_forget.py", "--method", method, *paths, *SHARED, *words, *OWN.get(method, ()), where=where)
        return folder

    return forget


def test_pre_training_learns_what_it_learns_on_a_cpu(pretrain):
    infos = [load_checkpoint(pretrain(name, where=w)).info for name, w in (("rehearsed", DEVICE), ("on-cpu", CPU))]
    assert infos[0]["acc"] == infos[1]["acc"] > 90


@pytest.mark.parametrize("name", METHODS)
def test_every_method_leaves_what_it_leaves_on_a_cpu(name, forget):
    on_device, on_cpu = (results_of(forget(name, where=where))["tasks"] for where in (DEVICE, CPU))
    assert len(on_device) == 2
    assert [task["after"] for task in on_device] == [task["after"] for task in on_cpu]


@pytest.mark.parametrize("name", [method.name for method in PUBLISHED])
def test_the_published_readings_run(name, forget):
    words = ("--warmup-epochs", 0) if name == "retrain" else ()
    assert results_of(forget(name, "--as-published", "--num-tasks", 1, *words))["finished"]


@pytest.mark.parametrize("name", ["ewc", "gs_lora_pp", "spotter", "unseen"])
def test_images_in_host_memory(name, forget):
    on_device, on_host = (results_of(forget(name, *words))["tasks"] for words in ((), ("--images", "host")))
    assert [task["after"] for task in on_host] == [task["after"] for task in on_device]


def test_the_audit_says_what_it_says_on_a_cpu(run, small, pretrain, forget, tmp_path, monkeypatch):
    monkeypatch.setattr("util.audit.relearning.STEPS", (0, 1, 2))
    monkeypatch.setattr("util.audit.pictures.TSNE", partial(TSNE, max_iter=250))
    run_folder = forget("l2")
    gone = ",".join(f"#{c}" for c in results_of(run_folder)["tasks"][0]["forget_classes"])
    without = ("--without-classes", gone, "--images", "host", "--mirror", "on")
    references = [pretrain(f"reference_{seed}", *without, "--seed", seed, epochs=2) for seed in (1, 2, 3)]
    original = pretrain("original", "--images", "device", "--seed", 4, epochs=2)
    words = ("--before", pretrain("rehearsed"), "--after", run_folder / "checkpoints/task_1.pth", "--forget-classes", gone)
    words += ("--metrics", "readout", "relearning", "cka")  # what else looks at a model looks at its embeddings on the CPU
    words += (
        "--data",
        small,
        "--strangers",
        small_strangers(tmp_path),
        "--originals",
        original,
        "--references",
        *references,
    )
    found = []
    for where in (DEVICE, CPU):
        run("scripts/audit.py", *words, "--precision", "fp32", "--output-dir", tmp_path / where.type, where=where)
        (request,) = json.loads((tmp_path / where.type / "audit.json").read_text())["requests"]
        found.append({key: figure["value"] for key, figure in request["figures"].items()})
    assert found[0] == pytest.approx(found[1], abs=0.1)


def small_strangers(tmp_path: Path) -> Path:
    images = coloured_images(14, 3, 32, seed=2)
    write_folder(tmp_path / "split", images.subset(images.labels > 7), images.subset(slice(0)))
    return tmp_path / "split" / "train"


@pytest.mark.parametrize("head", HEADS)
def test_no_head_waits(head):
    model = to_device(small_recognizer(6, head), HARDWARE)
    images = coloured_images(6, 2).to(DEVICE)
    with device.no_waits():
        model.head.loss(model.embed(images.images), images.labels).backward()
    assert all(parameter.grad.device == DEVICE for parameter in model.parameters() if parameter.requires_grad)


def test_relabelling_many_classes_does_not_wait():
    images = coloured_images(24, 2).to(DEVICE)
    (task,) = drawn_tasks(images.labels.cpu(), 24, per_task=20, data_ratio=1.0)
    args = train_forget.parse_arguments(["--method", "l2", "--checkpoint", "none", "--batch-size", "8"])
    method, model = METHODS["l2"](args, HARDWARE), to_device(small_recognizer(24), HARDWARE)
    method.begin_task(model, task, images, 1)
    (plan,) = method.passes(task, 0, 1)
    for batch in batches(images, plan, torch.Generator().manual_seed(0), DEVICE):
        with device.no_waits():
            method.loss(model, batch)
        relabelled = method.is_forgotten[batch.labels].cpu()
        assert relabelled.tolist() == [label in task.forget for label in batch.labels.tolist()]


def test_a_wrong_label_drawn_on_the_cpu_is_refused(forget, monkeypatch):
    drawn = lambda labels, classes: labels + torch.randint(1, classes, labels.shape)  # noqa: E731
    monkeypatch.setattr("methods.relabel.wrong_labels", drawn)
    with pytest.raises(RuntimeError, match="found at least two devices, rehearsal:0 and cpu"):
        forget("lwf", "--seed", 9)


def test_a_loss_that_is_read_is_refused(forget, monkeypatch):
    loss = METHODS["delete"].loss

    def read(method, model, batch):
        losses = loss(method, model, batch)
        return losses | {"total": losses["total"] * (1 if losses["total"] > 0 else 2)}

    monkeypatch.setattr(METHODS["delete"], "loss", read)
    with pytest.raises(device.Wait, match="_local_scalar_dense"):
        forget("delete", "--seed", 9)


X, MANY = torch.arange(6.0, device=DEVICE).view(2, 3), torch.arange(40, device=DEVICE)
MIXED = {
    "a sum": lambda: X + torch.ones(3),
    "a product": lambda: X @ torch.ones(3, 1),
    "a list": lambda: torch.stack([X.sum(), torch.tensor(1.0)]),
    "an index on the device": lambda: torch.ones(3)[MANY[:1]],
    "rows": lambda: X.index_select(0, torch.tensor([0])),
    "a result": lambda: torch.ones(2, 3).add_(X),
    "a generator": lambda: torch.rand(3, device=DEVICE, generator=torch.Generator()),
}
WAITS = {
    "item": lambda: X.sum().item(),
    "float": lambda: float(X.sum()),
    "if": lambda: bool(X.sum() > 0),
    "tolist": lambda: X.tolist(),
    "to the CPU": lambda: X.cpu(),
    "equal": lambda: torch.equal(X, X),
    "nonzero": lambda: X.nonzero(),
    "where": lambda: torch.where(X > 1),
    "unique": lambda: X.unique(),
    "isin": lambda: torch.isin(MANY, MANY[:20]),
    "masked_select": lambda: X.masked_select(X > 1),
    "a mask": lambda: X[X > 1],
    "a mask set": lambda: X.clone().index_put_((X > 1,), X.flatten()[:4]),
    "repeat_interleave": lambda: X.repeat_interleave(MANY[:2], dim=0),
    "bincount": lambda: MANY.bincount(),
    "svd": lambda: torch.linalg.svd(X),
    "a list of numbers": lambda: torch.tensor([1, 2], device=DEVICE),
    "to the device": lambda: torch.ones(3).to(DEVICE),
    "from pageable memory": lambda: torch.ones(3).to(DEVICE, non_blocking=True),
    "pinned, but waited for": lambda: torch.ones(3).pin_memory().to(DEVICE),
    "an index on the CPU": lambda: X[torch.tensor([0])],
}
ALLOWED = {
    "a scalar of the CPU": lambda: X + torch.tensor(1.0),
    "pinned": lambda: torch.ones(3).pin_memory().to(DEVICE, non_blocking=True),
    "born pinned": lambda: torch.empty(3, pin_memory=True).to(DEVICE, non_blocking=True),
    "few": lambda: torch.isin(MANY, MANY[:10]),
    "a number set": lambda: X.clone().__setitem__(0, 3.0),
    "repeated as often": lambda: X.repeat_interleave(2, dim=0),
    "masked_fill": lambda: X.masked_fill(X > 1, 0.0),
}


@pytest.mark.parametrize("name", MIXED)
def test_mixed_devices_are_refused(name):
    with pytest.raises(RuntimeError, match=r"device|cpu|CPU"):
        MIXED[name]()


@pytest.mark.parametrize("name", WAITS)
def test_waits_are_refused_where_they_are_watched(name):
    WAITS[name]()
    with pytest.raises(device.Wait), device.no_waits():
        WAITS[name]()


@pytest.mark.parametrize("name", ALLOWED)
def test_what_cuda_allows_runs(name):
    with device.no_waits():
        ALLOWED[name]()
