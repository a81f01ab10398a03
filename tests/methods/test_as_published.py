"""--as-published: what the published code's methods compute, told once more from reading it.

The losses in numpy, the wrong labels as its data set draws them, what its optimizers get, how many updates its loaders give
and which learning rates its schedulers.
"""

import copy
import math

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from backbone import lora
from backbone.recognizer import to_device
from data.tasks import drawn_requests, forgetting_tasks
from methods import METHODS, PUBLISHED
from methods.relabel import modulo_labels
from methods.retrain import Retrain
from train_forget import parse_arguments
from util.runtime.hardware import Hardware
from util.training.optim import make_optimizer, make_scheduler, steps_of_epochs

BY_EPOCH = ["l2", "ewc", "mas", "lwf", "der", "der_pp", "fdr", "lirf", "gs_lora", "gs_lora_pp"]
RATES = {"lwf": 1e-4, "l2": 1e-4, "ewc": 1e-4, "mas": 1e-4, "lirf": 1e-4, "der": 1e-3, "der_pp": 1e-3, "fdr": 1e-3}
RATES |= {"gs_lora": 1e-2, "gs_lora_pp": 1e-2}
# With the published relabelling, whichever class a forgotten image is of.
SHIFTED = ("l2", "ewc", "mas", "lwf", "der", "der_pp", "fdr", "lirf")


def published(name: str, *options: str):
    return parse_arguments(["--method", name, "--checkpoint", "x", "--device", "cpu", "--as-published", *options])


@pytest.fixture
def entered(begin, monkeypatch):
    """A task as published, entered by a model that has moved; a wrong label is the next of the ids below 3."""
    monkeypatch.setattr("methods.relabel.modulo_labels", lambda labels, forgotten: (labels + 1) % forgotten)

    def entered(name: str, *options: str, number: int = 2):
        epochs = ("--warmup-epochs", "1") if name == "retrain" else ()
        return begin(name, "--as-published", *epochs, *options, number=number, entered_moved=True)

    return entered


def wrong(begun, labels) -> np.ndarray:
    return (np.asarray(labels) + 1) % len(begun.task.forget)


# ---------------------------------------------------------------------------------------------------- losses


def test_lwf_relabels_and_replays(entered, arithmetic):
    begun = entered("lwf")
    batch = begun.batch()
    images, labels = batch.split(batch.images), batch.split(batch.labels)
    logits = {name: arithmetic.logits(begun.model, part) for name, part in images.items()}
    forget = arithmetic.cross_entropy(logits["forget"], wrong(begun, labels["forget"]))
    total = forget + 10 * arithmetic.cross_entropy(logits["remain"], labels["remain"])
    assert begun.method.loss(begun.model, batch)["total"].item() == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize(("name", "weight", "replay"), [("der", 0.01, 0.0), ("der_pp", 0.005, 0.005)])
def test_der_matches_the_pretrained_models_embeddings(entered, arithmetic, name, weight, replay):
    begun = entered(name)
    batch = begun.batch()
    images, labels = batch.split(batch.images), batch.split(batch.labels)
    forget = arithmetic.cross_entropy(arithmetic.logits(begun.model, images["forget"]), wrong(begun, labels["forget"]))
    ours, theirs = (arithmetic.embeddings(model, images["remain"]) for model in (begun.model, begun.pretrained))
    total = forget + weight * ((ours - theirs) ** 2).sum()
    if replay:
        total += replay * arithmetic.cross_entropy(arithmetic.logits(begun.model, images["replay"]), labels["replay"])
    assert begun.method.loss(begun.model, batch)["total"].item() == pytest.approx(total, rel=1e-5)


def test_fdr_matches_the_pretrained_models_training_logits(entered, arithmetic):
    begun = entered("fdr")
    batch = begun.batch()
    images, labels = batch.split(batch.images), batch.split(batch.labels)
    forget = arithmetic.cross_entropy(arithmetic.logits(begun.model, images["forget"]), wrong(begun, labels["forget"]))
    ours, theirs = (
        arithmetic.with_margin(arithmetic.logits(model, images["remain"]), labels["remain"])
        for model in (begun.model, begun.pretrained)
    )
    total = forget + 50 * np.linalg.norm(ours - theirs, axis=1).mean()
    assert begun.method.loss(begun.model, batch)["total"].item() == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize(("name", "rho"), [("scrub", 0.0), ("scrub_s", 0.1)])
def test_scrub_compares_training_logits_with_the_pretrained_models(entered, arithmetic, name, rho):
    begun = entered(name)
    # Within the first round of a run that enters here, the average is what entered.
    pairs = zip(begun.model.backbone.parameters(), begun.before.backbone.parameters(), strict=True)
    distance = sum(np.linalg.norm((arithmetic.array(a) - arithmetic.array(b)).ravel()) for a, b in pairs)
    for number in (0, 1):
        batch = begun.batch(number)
        logits, teacher = (arithmetic.logits(model, batch.images) for model in (begun.model, begun.pretrained))
        kl = arithmetic.kl(*(arithmetic.with_margin(each, batch.labels) for each in (teacher, logits)), 2.0)
        expected = -kl if number == 0 else 0.99 * arithmetic.cross_entropy(logits, batch.labels) + 0.001 * kl
        total = begun.method.loss(begun.model, batch)["total"].item()
        assert total == pytest.approx(expected + rho * distance, rel=1e-4)


def mid(model, images: torch.Tensor) -> np.ndarray:
    seen = []
    handle = model.backbone.blocks[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    model.embed(images)
    handle.remove()
    return seen[0].detach().double().numpy()


def channel_maps(model, images: torch.Tensor) -> np.ndarray:
    maps = (mid(model, images) ** 2).mean(axis=1)
    maps = maps / np.linalg.norm(maps, axis=1, keepdims=True)
    return np.where(maps < 0.005, 0.0, maps)


def test_lirf_distils_with_the_margin_at_wrong_labels_and_leaves_the_deposit(entered, arithmetic):
    begun = entered("lirf")
    batch, k = begun.batch(), len(begun.task.forget)
    images, labels = batch.split(batch.images), batch.split(batch.labels)
    false = wrong(begun, labels["forget"])
    plain = copy.deepcopy(begun.model)
    del plain.deposit
    logits = {name: arithmetic.logits(plain, part) for name, part in images.items()}
    student = arithmetic.with_margin(logits["forget"], false)
    teacher = arithmetic.with_margin(arithmetic.logits(begun.pretrained, images["forget"]), false)
    at = ((channel_maps(plain, images["forget"]) - channel_maps(begun.pretrained, images["forget"])) ** 2).mean()
    total = 0.9 * arithmetic.cross_entropy(logits["forget"], false) - 300 * at
    total += 10 * 0.1 * arithmetic.kl(teacher[:, k:], student[:, k:], 10.0)
    total += 5 * arithmetic.cross_entropy(logits["remain"], labels["remain"])
    losses = begun.method.loss(begun.model, batch)
    assert losses["total"].item() == pytest.approx(total, rel=1e-4)
    assert "deposit" not in losses  # constant: its half is in no optimizer
    for name, tensor in begun.model.deposit.state_dict().items():
        assert torch.equal(tensor, begun.pretrained.backbone.get_parameter(name))


def test_entries_of_a_map_below_the_threshold_pass_no_gradient(entered):
    begun = entered("lirf")
    images = begun.batch().images[:2]
    with torch.no_grad():
        begun.model.backbone.blocks[0].mlp.fc2.bias.mul_(50)
    maps, _ = begun.method._maps_and_embeddings(begun.model, begun.model.backbone, images)
    assert (maps == 0).any() and (maps[maps > 0] > 0.005).all()


def test_gs_lora_pp_takes_the_prototypes_of_the_model_that_enters(entered, arithmetic):
    begun = entered("gs_lora_pp")
    seen = torch.cat([begun.task.forget_indices, begun.task.remain_indices])
    labels = begun.images.labels[seen].numpy()
    embeddings = arithmetic.embeddings(begun.before, begun.images.images[seen])
    for label in {*labels.tolist()}:
        expected = embeddings[labels == label].mean(axis=0)
        np.testing.assert_allclose(begun.method.prototypes[label].numpy(), expected, rtol=1e-5, atol=1e-6)


def test_gs_lora_is_its_loss_from_the_first_step(entered, arithmetic):
    begun = entered("gs_lora")
    begun.method.begin_epoch(begun.model, 0)
    batch = begun.batch()
    images, labels = batch.split(batch.images), batch.split(batch.labels)
    entropy = {n: arithmetic.cross_entropy(arithmetic.logits(begun.model, part), labels[n]) for n, part in images.items()}
    blocks = [[], []]
    for name, parameter in begun.model.named_parameters():
        if "lora_" in name:
            blocks[int(name.split(".")[2])].append(arithmetic.array(parameter).ravel())
    sparsity = sum(np.linalg.norm(np.concatenate(block)) for block in blocks)
    total = entropy["remain"] + 0.25 * max(0.0, 105 - entropy["forget"]) + 1e-4 * sparsity
    assert begun.method.loss(begun.model, batch)["total"].item() == pytest.approx(total, rel=1e-6)


def test_l2_has_a_term_for_each_task(entered, arithmetic, move_weights):
    begun = entered("l2", number=1)
    centres = [begun.before]
    begun.method.end_task(begun.model)
    centres.append(copy.deepcopy(begun.model))
    begun.method.begin_task(begun.model, begun.tasks[1], begun.images, 4)
    move_weights(begun.model, seed=9)
    batch = begun.batch()
    labels = batch.labels.numpy()
    taught = np.where(np.isin(labels, begun.task.forget), wrong(begun, labels), labels)
    total = arithmetic.cross_entropy(arithmetic.logits(begun.model, batch.images), taught)
    for centre in centres:
        pairs = zip(begun.model.backbone.parameters(), centre.backbone.parameters(), strict=True)
        total += 0.1 * sum(((arithmetic.array(a) - arithmetic.array(b)) ** 2).sum() for a, b in pairs)
    assert begun.method.loss(begun.model, batch)["total"].item() == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("name", ["ewc", "mas"])
def test_importances_of_later_tasks_are_of_all_remaining_images(entered, name):
    first, second = entered(name, number=1), entered(name)
    assert torch.equal(first.method.importance_indices(), first.task.remain_indices)
    of_remaining = [i for i, label in enumerate(second.images.labels.tolist()) if label in second.task.remain]
    assert second.method.importance_indices().tolist() == of_remaining
    assert len(of_remaining) > len(second.task.remain_indices)


def test_ewc_weighs_batches_by_their_size_and_mas_does_not(entered, arithmetic):
    """Ω of one parameter tensor by hand: gradients of each batch's mean loss, as the loaders shuffle them."""
    for name in ("ewc", "mas"):
        begun = entered(name, "--batch-size", "7", number=1)
        indices = begun.task.remain_indices
        order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(11))
        parameter, total = begun.before.backbone.blocks[1].mlp.fc1.weight, 0
        parts = indices[order].split(7)
        assert len(parts[-1]) < 7
        for part in parts:
            labels = begun.images.labels[part]
            training = begun.before.head.add_margin(begun.before(begun.images.images[part]), labels)
            if name == "ewc":
                (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(training, labels), parameter)
                total += gradient**2 * len(part) / len(parts)
            else:
                (gradient,) = torch.autograd.grad((training**2).mean(), parameter)
                total += gradient.abs() / len(parts)
        found = begun.method.importance["backbone.blocks.1.mlp.fc1.weight"]
        torch.testing.assert_close(found, total, rtol=1e-6, atol=1e-12)


# ---------------------------------------------------------------------------------------------------- wrong labels


def test_wrong_labels_are_taken_modulo_the_number_of_forgotten_classes():
    torch.manual_seed(0)
    labels = torch.tensor([3, 57, 19, 80]).repeat(4000)
    drawn = modulo_labels(labels, 20)
    assert drawn.min() == 0 and drawn.max() == 19
    assert not (drawn == labels).any()
    for label in (57, 80):  # from beyond, each equally often
        counts = torch.bincount(drawn[labels == label], minlength=20).double()
        assert ((counts - 200) ** 2 / 200).sum() < 43.8  # 19 degrees of freedom: one draw in a thousand
    counts = torch.bincount(drawn[labels == 3], minlength=20)
    assert counts[3] == 0 and counts[4] > 300  # the own id's share goes to the next
    assert torch.bincount(drawn[labels == 19], minlength=20)[0] > 300


@pytest.mark.parametrize("name", SHIFTED)
def test_the_relabelling_methods_draw_them(begin, monkeypatch, name):
    asked = []
    monkeypatch.setattr("methods.relabel.modulo_labels", lambda labels, forgotten: asked.append(forgotten) or labels * 0)
    begun = begin(name, "--as-published", classes=9)
    begun.method.loss(begun.model, begun.batch())
    assert set(asked) == {len(begun.task.forget)} == {3}


# ---------------------------------------------------------------------------------------------------- what is trained


@pytest.mark.parametrize("name", [method.name for method in PUBLISHED])
def test_the_trained_parameters(begin, name):
    begun = begin(name, "--as-published", *(("--warmup-epochs", "1") if name == "retrain" else ()), number=2)
    names = {n for n, _ in begun.model.named_parameters()}
    trained = {n for n, p in begun.model.named_parameters() if p.requires_grad}
    if name in ("gs_lora", "gs_lora_pp"):
        assert trained == {n for n in names if "lora_" in n}
    elif name == "lirf":  # the student alone
        half = ("backbone.cls_token", "backbone.pos_embed", "backbone.patch_embed.", "backbone.blocks.0.")
        assert trained == {n for n in names if n.startswith(half)}
    elif name == "retrain":
        assert trained == names
    else:
        assert trained == {n for n in names if n.startswith("backbone.")}


@pytest.mark.parametrize("name", ["scrub", "scrub_s"])
def test_scrubs_adam_decays_every_parameter(begin, name):
    begun = begin(name, "--as-published")
    groups = make_optimizer(begun.model, begun.method.args, begun.method.hardware).param_groups
    assert {group["weight_decay"] for group in groups if group["params"]} == {5e-4}
    decayed = [parameter for group in groups for parameter in group["params"] if parameter.requires_grad]
    assert len(decayed) == len([*begun.model.backbone.parameters()])  # timm before 1.0.27 takes frozen ones in as well


def test_retrain_starts_each_task_with_the_published_weights(make_recognizer, make_images, make_tasks, cpu):
    images, model = make_images(), to_device(make_recognizer(), cpu)
    tasks, method = make_tasks(images, 2), Retrain(published("retrain"), cpu)
    method.begin_task(model, tasks[0], images, 4)
    block = model.backbone.blocks[0]
    for layer in (block.mlp.fc1, block.mlp.fc2, block.attn.proj):
        bound = layer.in_features**-0.5  # torch's default of a linear layer, weights and bias
        assert 0.9 * bound < layer.weight.abs().max() <= bound
        assert 0 < layer.bias.abs().max() <= bound
    queries, keys, _ = block.attn.qkv.weight.abs().amax(dim=1).chunk(3)
    assert queries.max().item() == pytest.approx(keys.max().item() / math.sqrt(block.attn.num_heads), rel=0.05)
    assert model.backbone.pos_embed.std().item() == pytest.approx(1, abs=0.1)
    assert model.backbone.cls_token.std().item() == pytest.approx(1, abs=0.3)
    weights = copy.deepcopy(model.state_dict())
    method.begin_task(model, tasks[1], images, 4)
    assert not any(torch.equal(weights[name], tensor) for name, tensor in model.named_parameters() if tensor.std() > 0)


@pytest.mark.parametrize(("number", "slope"), [(1, 5), (2, 50), (3, 50)])
def test_adapters_of_later_tasks_start_smaller(begin, number, slope):
    begun = begin("gs_lora", "--as-published", number=number, tasks=3, moved=False)
    for layer in lora.adapted_layers(begun.model.backbone).values():
        bound = math.sqrt(6 / ((1 + slope) * layer.in_features))
        assert 0.8 * bound < layer.lora_A.abs().max() <= bound
        assert not layer.lora_B.any()


def test_gs_lora_drops_no_group_and_gs_lora_pp_leaves_its_last_weights(begin, random_adapters):
    begun = begin("gs_lora", "--as-published")
    with torch.no_grad():
        for layer in lora.adapted_layers(begun.model.backbone).values():
            layer.lora_B.mul_(1e-9)
    assert begun.method.end_task(begun.model).groups["zero_ratio"] == 0.0
    begun = begin("gs_lora_pp", "--as-published", "--ema-start", "0")
    for epoch in range(3):
        random_adapters(begun.model, seed=epoch)
        begun.method.end_epoch(begun.model, epoch)
    last = lora.adapter_tensors(begun.model.backbone)
    left = begun.method.end_task(begun.model).files["adapters"]
    assert all(torch.equal(left[name], tensor) for name, tensor in last.items())


def test_scrub_s_averages_over_the_run(begin, move_weights):
    """The first round's end replaces the start; from then on a tenth of each round's weights, also in the next task."""
    begun = begin("scrub_s", "--as-published", "--epochs", "4", "--rounds", "2")
    method, model = begun.method, begun.model
    expected = None
    for task in begun.tasks:
        if task.number > 1:
            method.end_task(model)
            method.begin_task(model, task, begun.images, 4)
        for epoch in range(4):
            move_weights(model, seed=10 * task.number + epoch)
            method.end_epoch(model, epoch)
            if epoch % 2:
                now = [p.detach().clone() for p in model.backbone.parameters()]
                mixed = zip(expected or now, now, strict=True)
                expected = [0.9 * average + 0.1 * weight if expected else weight for average, weight in mixed]
    for average, value in zip(method.average.module, expected, strict=True):
        torch.testing.assert_close(average.detach(), value)
    resumed = METHODS["scrub_s"](method.args, method.hardware)
    resumed.begin_run(begun.pretrained, begun.tasks, begun.images)
    resumed.load_state_dict(method.state_dict())
    resumed.begin_task(model, begun.tasks[1], begun.images, 4)
    assert all(torch.equal(a, b) for a, b in zip(resumed.average.module, method.average.module, strict=True))


# ---------------------------------------------------------------------------------------------------- length and rates


def casia(few_shot: int | None = None):
    """Tasks over as many images as CASIA-100 has, unequally many a class, and the sizes of their D_f and D_r."""
    counts = np.random.default_rng(0).integers(200, 700, 100)
    labels = torch.repeat_interleave(torch.arange(100), torch.from_numpy(counts))
    return forgetting_tasks(labels, 100, drawn_requests(100, 4, 20, 1337), seed=1337, few_shot=few_shot)


@pytest.mark.parametrize("name", [method.name for method in PUBLISHED])
def test_the_updates_of_each_task(name):
    args = published(name)
    assert (args.epochs, args.batch_size, args.min_updates) == (100, 48, 0)
    method = METHODS[name](args, Hardware(torch.device("cpu"), bf16=False))
    for task in casia():
        forget, remain = (math.ceil(len(indices) / 48) for indices in (task.forget_indices, task.remain_indices))
        both = math.ceil((len(task.forget_indices) + len(task.remain_indices)) / 48)
        expected = {
            **dict.fromkeys(("lwf", "der", "der_pp", "fdr", "lirf"), 100 * forget),
            **dict.fromkeys(("gs_lora", "gs_lora_pp", "retrain"), 100 * remain),
            **dict.fromkeys(("l2", "ewc", "mas"), 100 * both),
            **dict.fromkeys(("scrub", "scrub_s"), 10 * (5 * (forget + remain) + 5 * remain)),
        }
        assert sum(steps_of_epochs(method, task, 100)) == expected[name]


def loaders(task, batch_size: int, *streams: str) -> list[tuple[int, ...]]:
    """The sizes of an epoch's batches: torch's loaders, which drop nothing; the first says how long, others start anew."""

    def endless(stream):
        while True:
            yield from DataLoader(getattr(task, f"{stream}_indices"), batch_size)

    first = DataLoader(getattr(task, f"{streams[0]}_indices"), batch_size)
    return [tuple(map(len, parts)) for parts in zip(first, *map(endless, streams[1:]), strict=False)]


@pytest.mark.parametrize("name", [method.name for method in PUBLISHED])
def test_the_last_batch_is_what_is_left(name):
    method = METHODS[name](published(name, "--batch-size", "7"), Hardware(torch.device("cpu"), bf16=False))
    (task, *_) = forgetting_tasks(torch.arange(5).repeat_interleave(11), 5, [[0], [1]], seed=1, data_ratio=1)
    expected = {
        **{key: [loaders(task, 7, "forget", "remain")] for key in ("lwf", "der", "fdr", "lirf")},
        "der_pp": [loaders(task, 7, "forget", "remain", "remain")],
        **{key: [[sizes[::-1] for sizes in loaders(task, 7, "remain", "forget")]] for key in ("gs_lora", "gs_lora_pp")},
        "retrain": [loaders(task, 7, "remain")],
        **{key: [[(7,)] * 7 + [(6,)]] for key in ("l2", "ewc", "mas")},
        **{key: [loaders(task, 7, "forget"), loaders(task, 7, "remain")] for key in ("scrub", "scrub_s")},
    }
    plans = method.passes(task, 0, 100)
    assert [[tuple(plan.sizes_at(step).values()) for step in range(plan.steps)] for plan in plans] == expected[name]


def rates_of(args, steps_per_epoch: int = 3) -> list[float]:
    """The learning rate of every update, as the engine asks for it."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=args.lr)
    scheduler = make_scheduler(optimizer, args, [steps_per_epoch] * args.epochs)
    rates = []
    for epoch in range(args.epochs):
        scheduler.step(epoch)
        for step in range(steps_per_epoch):
            scheduler.step_update(epoch * steps_per_epoch + step)
            rates.append(optimizer.param_groups[0]["lr"])
    return rates


def cosine(peak: float, epoch: int) -> float:
    return 1e-5 + 0.5 * (peak - 1e-5) * (1 + math.cos(math.pi * epoch / 100))


@pytest.mark.parametrize("name", [method.name for method in PUBLISHED])
def test_the_learning_rates(name):
    rates = rates_of(published(name))
    if name in ("scrub", "scrub_s"):
        expected = [1e-4 if epoch < 70 else 1e-5 for epoch in range(100)]
    elif name == "retrain":
        expected = [1e-6 + epoch * (3e-4 - 1e-6) / 5 if epoch < 5 else cosine(3e-4, epoch) for epoch in range(100)]
    else:
        expected = [cosine(RATES[name], epoch) for epoch in range(100)]
    assert rates == pytest.approx(np.repeat(expected, 3).tolist(), rel=1e-9)


# ---------------------------------------------------------------------------------------------------- few-shot


def test_the_few_shot_preset():
    for name in METHODS:
        few, table = (parse_arguments(["--method", name, "--checkpoint", "x", *words]) for words in FEW_AND_TABLE)
        different = {key for key in vars(few) if getattr(few, key) != getattr(table, key)} - {"as_published"}
        assert few.few_shot == 4 and table.few_shot is None
        if name == "gs_lora_pp":
            assert few.batch_size == 4
            assert few.beta == [0.3, 0.4, 0.28, 0.2]
            assert few.lambda_forget == [0.015, 0.06, 0.025, 0.012]
            assert few.prototype_bound == 50.0
            assert different == {"few_shot", "batch_size", "beta", "lambda_forget", "prototype_bound"}
        else:
            assert different == {"few_shot"} | ({"batch_size", "beta"} if name == "gs_lora" else set())


FEW_AND_TABLE = (["--as-published", "few-shot"], ["--as-published"])
