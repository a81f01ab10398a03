"""What holds for every method."""

import io

import pytest
import torch

from backbone.recognizer import to_device
from methods import METHODS, PUBLISHED
from train_forget import build_parser, parse_arguments
from util.runtime.errors import UsageError
from util.training.engine import Trainer
from util.training.monitor import Monitor
from util.training.optim import derived_seed

ALL = pytest.mark.parametrize("name", list(METHODS))
TRAINED = [name for name in METHODS if name != "ssd"]  # which makes no pass
TRAINING = pytest.mark.parametrize("name", TRAINED)
PUBLISHED_ONES = pytest.mark.parametrize("name", [method.name for method in PUBLISHED])
ADAPTERS = ("gs_lora", "gs_lora_pp", "unseen")
# Of the methods that keep something over epochs: settings by which it matters within four epochs.
SHORT = {
    "gs_lora": ("--sparsity-warmup-epochs", "1", "--alpha", "0.1", "--negligible", "0"),
    "gs_lora_pp": ("--ema-start", "1", "--alpha", "0.1", "--lambda-remain", "0.1", "--negligible", "0"),
    "lirf": ("--attention-weight", "30000"),
    "scrub": ("--rounds", "2", "--kd-weight", "0.1"),
    "scrub_s": ("--rounds", "2", "--kd-weight", "0.1", "--rho", "1"),
}


def expected_trainable(name: str, model) -> set[str]:
    names = {n for n, _ in model.named_parameters()}
    if name == "retrain":
        return names
    if name == "lirf":
        lower = ("cls_token", "pos_embed", "patch_embed.", "blocks.0.")
        return {n for n in names if n.startswith("deposit.") or n.removeprefix("backbone.").startswith(lower)}
    if name in ADAPTERS:
        return {n for n in names if n.endswith(("lora_A", "lora_B"))}
    return {n for n in names if n.startswith("backbone.")}


@TRAINING
@pytest.mark.parametrize("number", [1, 2])
def test_a_method_trains_what_it_should_and_moves_no_head(begin, name, number):
    begun = begin(name, *SHORT.get(name, ()), number=number)
    expected = expected_trainable(name, begun.model)
    assert expected
    assert {n for n, p in begun.model.named_parameters() if p.requires_grad} == expected
    assert ("head.weight" in expected) == (name == "retrain")
    for i in range(len(begun.method.passes(begun.method.task, 0, begun.method.epochs))):
        begun.model.zero_grad()
        begun.method.loss(begun.model, begun.batch(i))["total"].backward()
        assert {n for n, p in begun.model.named_parameters() if p.grad is not None} == expected


@ALL
def test_a_task_after_another_trains_the_same(begin, name):
    begun = begin(name)
    first = {n for n, p in begun.model.named_parameters() if p.requires_grad}
    begun.method.end_task(begun.model)
    assert begun.model.state_dict().keys() == begun.before.state_dict().keys()
    begun.method.begin_task(begun.model, begun.tasks[1], begun.images, begun.method.args.epochs)
    assert {n for n, p in begun.model.named_parameters() if p.requires_grad} == first


@ALL
def test_beginning_a_task_changes_no_output_but_retrains(begin, name):
    begun = begin(name, moved=False)
    same = torch.equal(begun.model(begun.images.images), begun.before(begun.images.images))
    assert same == (name != "retrain")


@pytest.mark.parametrize(("name", "pass_number"), [*((name, 0) for name in TRAINED), ("scrub", 1), ("scrub_s", 1)])
def test_the_gradient_is_that_of_the_loss(begin, monkeypatch, name, pass_number):
    """Along the gradient the total rises as fast as the gradient is long, whatever its parts detach."""
    monkeypatch.setattr("methods.relabel.wrong_labels", lambda y, n: (y + 1) % n)
    begun = begin(name, *SHORT.get(name, ()))
    if name.startswith("scrub"):
        begun.method.args.bound = 1e9  # the bound of one image or another lies within the step
    batch = begun.batch(pass_number)
    trained = [p for p in begun.model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(begun.method.loss(begun.model, batch)["total"], trained)
    length = torch.cat([g.flatten() for g in gradients]).norm().item()
    step, totals = 1e-3, []
    with torch.no_grad():
        for sign in (1, -2):
            for p, g in zip(trained, gradients, strict=True):
                p += sign * step * g / length
            totals.append(begun.method.loss(begun.model, batch)["total"].item())
    assert (totals[0] - totals[1]) / (2 * step) == pytest.approx(length, rel=0.02)


def trainer_of(name: str, method_arguments, make_recognizer, make_images, make_tasks, hardware, number: int) -> Trainer:
    """A run's trainer, as `util.training.continual` makes it."""
    args = method_arguments(name, "--epochs", "4", "--lr", "1e-3", "--seed", "7", *SHORT.get(name, ()))
    images = make_images()
    tasks = make_tasks(images, 2)
    model = to_device(make_recognizer(pos_drop_rate=0.1), hardware)
    method = METHODS[name](args, hardware)
    method.begin_run(model, tasks, images)
    torch.manual_seed(derived_seed(7, number))
    method.begin_task(model, tasks[number - 1], images, method.args.epochs)
    return Trainer(model, method, tasks[number - 1])


@pytest.fixture
def make_trainer(method_arguments, make_recognizer, make_images, make_tasks, cpu):
    def make_trainer(name: str, number: int = 1) -> Trainer:
        return trainer_of(name, method_arguments, make_recognizer, make_images, make_tasks, cpu, number)

    return make_trainer


def train(trainer: Trainer, after_epoch=lambda trainer: None) -> None:
    with Monitor(None, "test", "test", trainer.epochs) as monitor:
        trainer.train(monitor, lambda trainer: None, after_epoch)


def through_a_file(state: dict) -> dict:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def tensors(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert not [name for name in first if not torch.equal(first[name], second[name])]


@TRAINING
@pytest.mark.parametrize("epochs_done", [1, 2, 3])
def test_a_task_continues_from_its_saved_state_as_if_never_interrupted(make_trainer, name, epochs_done):
    states, weights = [], []

    def keep(trainer: Trainer) -> None:
        states.append(through_a_file(trainer.state_dict()))
        weights.append(tensors(trainer))

    whole = make_trainer(name)
    train(whole, after_epoch=keep)
    assert any(not torch.equal(weights[-1][n], tensor) for n, tensor in weights[epochs_done - 1].items())

    resumed = make_trainer(name)
    torch.manual_seed(123)  # another process would not have this one's generator
    resumed.load_state_dict(states[epochs_done - 1])
    assert resumed.position.epoch == epochs_done
    train(resumed)
    assert_equal(tensors(resumed), tensors(whole))
    first, second = (trainer.method.end_task(trainer.model).files for trainer in (whole, resumed))
    assert_equal(tensors(resumed), tensors(whole))
    assert first.keys() == second.keys()
    for kind, values in first.items():
        assert_equal(second[kind], values)


@TRAINING
def test_training_leaves_the_head_and_what_is_frozen(make_trainer, name):
    trainer = make_trainer(name)
    frozen = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    start = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert ("head.weight" in frozen) == (name != "retrain")
    train(trainer)
    now = dict(trainer.model.named_parameters())
    assert all(torch.equal(now[n], value) for n, value in frozen.items())
    assert all(not torch.equal(now[n], value) for n, value in start.items())


IMPOSSIBLE = [
    *[(name, ("--lambda", "-1")) for name in ("l2", "ewc", "mas", "der", "der_pp", "fdr")],
    ("der_pp", ("--lambda-replay", "-0.1")),
    ("lwf", ("--lambda-remain", "-1")),
    ("lwf", ("--lambda-kd", "-1")),
    *[(name, ("--temperature", value)) for name in ("lwf", "scrub", "scrub_s", "lirf") for value in ("0", "-1", "nan")],
    *[(name, options) for name in ("scrub", "scrub_s") for options in (("--rounds", "0"), ("--gamma", "-1"))],
    *[(name, ("--kd-weight", "-0.1")) for name in ("scrub", "scrub_s", "lirf")],
    ("scrub_s", ("--rho", "-1")),
    ("lirf", ("--kd-share", "2")),
    ("lirf", ("--kd-share", "-0.1")),
    *[("lirf", (f"--{part}-weight", "-1")) for part in ("attention", "deposit", "replay")],
    ("gs_lora_pp", ("--ema-decay", "1.1")),
    ("gs_lora_pp", ("--ema-decay", "-0.1")),
    ("gs_lora_pp", ("--ema-start", "-1")),
    ("gs_lora_pp", ("--lambda-forget", "0.1", "-0.1")),
    ("gs_lora_pp", ("--lambda-remain", "-1")),
    ("gs_lora", ("--rank", "0")),
    ("gs_lora", ("--beta", "0.1", "-0.1")),
    ("gs_lora", ("--negligible", "-1")),
    ("gs_lora_pp", ("--alpha", "-1")),
]


@pytest.mark.parametrize(("name", "options"), IMPOSSIBLE)
def test_impossible_options_are_refused(name, options):
    with pytest.raises(UsageError):
        parse_arguments(["--method", name, "--checkpoint", "x", *options])


SHARED = {"lr", "weight_decay", "warmup_epochs", "opt", "sched", "decay_on", "epoch_over", "batch_size"}


def published_of(name: str) -> dict:
    options = {option.name: option for option in METHODS[name].options}.values()
    return {option.dest: option.published for option in options if option.published is not None}


@ALL
def test_the_defaults_and_zero_weights_are_possible(name):
    parse_arguments(["--method", name, "--checkpoint", "x"])
    weights = [option for option in METHODS[name].options if option.help.startswith("weight ")]
    zeros = [word for option in weights for word in (f"--{option.name.replace('_', '-')}", "0")]
    args = parse_arguments(["--method", name, "--checkpoint", "x", *zeros])
    assert all(getattr(args, option.dest) in (0, [0]) for option in weights)


@PUBLISHED_ONES
def test_published_values_are_of_the_options_kind(name):
    options = {option.name: option for option in METHODS[name].options}.values()
    assert published_of(name)
    for option in options:
        assert option.choices is None or {option.default, option.published} - {None} <= {*option.choices}
        assert option.published is None or type(option.published) is type(option.default)
        assert option.help or option.name in SHARED


@PUBLISHED_ONES
def test_as_published_sets_them(name):
    args = parse_arguments(["--method", name, "--checkpoint", "x", "--as-published"])
    assert {key: getattr(args, key) for key in published_of(name)} == published_of(name)


@PUBLISHED_ONES
def test_an_explicit_option_wins_over_the_published_value(name):
    published = published_of(name)
    actions = {action.dest: action for action in build_parser(METHODS[name], None).actions()}
    for key, value in published.items():
        action = actions[key]
        if action.choices is not None:
            other = next(choice for choice in action.choices if choice != value)
        else:
            first = value[0] if isinstance(value, list) else value
            other = first + 1 if isinstance(first, int) else first / 2 + 0.001
        for order in (0, 1):  # before and after --as-published
            explicit = [action.option_strings[0], str(other)]
            explicit.insert(2 * order, "--as-published")
            args = parse_arguments(["--method", name, "--checkpoint", "x", *explicit])
            assert getattr(args, key) == ([other] if isinstance(value, list) else other)
            assert all(getattr(args, k) == published[k] for k in published.keys() - {key})


@ALL
def test_without_as_published_the_readings_are_the_papers(name):
    args = parse_arguments(["--method", name, "--checkpoint", "x"])
    readings = {"fisher": "image", "importance": "image", "kd_logits": "label-free", "kd_columns": "classes"}
    readings["distill_on"] = "probabilities" if name == "fdr" else "logits"
    readings |= {"teacher": "task", "prototypes": "run", "wrong_labels": "all", "importance_data": "sampled"}
    readings |= {"terms": "last", "average_over": "task", "deposit": "trained", "attention_map": "tokens"}
    readings |= {"init": "timm", "last_batch": "full", "epoch_over": "longest", "later_slope": 5.0}
    assert {key: getattr(args, key) for key in readings if hasattr(args, key)} == {
        key: value for key, value in readings.items() if hasattr(args, key)
    }


@pytest.mark.parametrize("abbreviated", [("--as-pub",), ("--meth", "ewc")])
def test_an_abbreviated_option_is_refused(abbreviated):
    with pytest.raises(UsageError, match="unrecognized arguments"):
        parse_arguments(["--checkpoint", "x", *abbreviated])
