import os
import signal
from types import SimpleNamespace

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from data.batches import Pass
from data.tasks import pretraining_task
from methods.base import Method
from methods.pretrain import Pretrain
from util.evaluation.evaluate import predict
from util.runtime.errors import RunError, UsageError
from util.runtime.interrupt import Interrupted
from util.training.engine import Trainer
from util.training.monitor import Monitor
from util.training.optim import derived_seed, epochs_for, steps_of_epochs

OPTIONS = {"lr": 1e-3, "min_lr": 1e-5, "weight_decay": 0.05, "warmup_epochs": 0, "opt": "adamw", "sched": "cosine"}
OPTIONS |= {"decay_on": "matrices", "clip_grad": None, "seed": 7}
OPTIONS |= {"batch_size": 16, "last_batch": "full", "mirror": "on", "epoch_over": "longest"}


def trainer_for(model, images, hardware, method=Pretrain, epochs=3, **changes) -> Trainer:
    chosen = method(SimpleNamespace(**OPTIONS | changes), hardware)
    task = pretraining_task(images.labels, len(images.classes))
    chosen.begin_task(model, task, images, epochs)
    return Trainer(model, chosen, task)


def nothing(trainer: Trainer) -> None:
    pass


def train(trainer: Trainer, save=nothing, after_epoch=nothing) -> None:
    with Monitor(None, "test", "test", trainer.epochs) as monitor:
        trainer.train(monitor, save, after_epoch)


def weights(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_the_loop_learns(make_recognizer, make_images, cpu):
    model, images = make_recognizer(), make_images()
    train(trainer_for(model, images, cpu, epochs=60, lr=3e-3, warmup_epochs=5))
    assert predict(model, make_images(seed=1), cpu).accuracies(range(6))["acc"] > 90


def test_a_run_repeats_bit_for_bit_and_a_resumed_one_too(make_recognizer, make_images, cpu):
    images = make_images()
    whole = make_recognizer(pos_drop_rate=0.1)
    train(trainer_for(whole, images, cpu, epochs=4))

    states = []
    first = make_recognizer(pos_drop_rate=0.1)
    train(trainer_for(first, images, cpu, epochs=4), after_epoch=lambda t: states.append(copy_state(t)))
    assert torch.equal(weights(first), weights(whole))

    resumed = make_recognizer(pos_drop_rate=0.1)
    trainer = trainer_for(resumed, images, cpu, epochs=4)
    torch.manual_seed(123)  # another process would not have this one's generator
    trainer.load_state_dict(states[1])
    assert trainer.position.epoch == 2
    train(trainer)
    assert torch.equal(weights(resumed), weights(whole))


# Updates of three epochs of four, six and six steps: within a pass, at its end, at an epoch's end, and twice.
@pytest.mark.parametrize("moments", [[2], [6], [7], [4], [10], [16], [3, 5], [1, 2]])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_training_after_a_step_and_it_resumes_there(moments, number, make_recognizer, make_images, cpu):
    images = make_images()
    options = {"method": TwoPasses, "epochs": 3, "clip_grad": 1.0}
    whole = make_recognizer(pos_drop_rate=0.1)
    train(trainer_for(whole, images, cpu, **options))

    state, model = None, None
    for moment in [*moments, None]:
        model = make_recognizer(pos_drop_rate=0.1)
        trainer = trainer_for(model, images, cpu, **options)
        if state is not None:
            torch.manual_seed(123)
            trainer.load_state_dict(state)
        if moment is None:
            train(trainer)
            break
        saved, step = [], trainer.step

        def signalled(batch, trainer=trainer, step=step, moment=moment):
            losses = step(batch)
            if trainer.position.updates == moment:
                os.kill(os.getpid(), number)
            return losses

        trainer.step = signalled
        with pytest.raises(Interrupted, match=f"stopped by {number.name} in epoch . of 3 and saved") as caught:
            train(trainer, save=lambda t, saved=saved: saved.append(copy_state(t)))
        assert caught.value.exit_code == 128 + number
        (state,) = saved
        assert state["position"]["updates"] == moment
    assert torch.equal(weights(model), weights(whole))
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # as before


def test_a_second_interrupt_does_not_wait(make_recognizer, make_images, cpu):
    trainer = trainer_for(make_recognizer(), make_images(), cpu)

    def twice(batch):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    trainer.step = twice
    with pytest.raises(KeyboardInterrupt):
        train(trainer, save=lambda trainer: None)


def copy_state(trainer: Trainer) -> dict:
    import io

    buffer = io.BytesIO()
    torch.save(trainer.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_the_schedule_warms_up_and_ends_at_the_minimum(make_recognizer, make_images, cpu):
    trainer = trainer_for(make_recognizer(), make_images(), cpu, epochs=10, warmup_epochs=2, lr=1e-2, min_lr=1e-4)
    per_epoch, *_ = steps_of_epochs(trainer.method, trainer.task, 10)
    rates = []
    for update in range(10 * per_epoch + 1):
        trainer.scheduler.step_update(update)
        rates.append(trainer.optimizer.param_groups[0]["lr"])
    assert rates[0] == 0.0
    assert rates[per_epoch] == pytest.approx(0.5e-2)
    assert rates[2 * per_epoch] == pytest.approx(1e-2)
    middle = 1e-4 + (1e-2 - 1e-4) / 2
    assert rates[6 * per_epoch] == pytest.approx(middle)
    assert rates[-1] == pytest.approx(1e-4)


def test_biases_and_norms_are_spared_the_weight_decay(make_recognizer, make_images, cpu):
    trainer = trainer_for(make_recognizer(), make_images(), cpu)
    for group in trainer.optimizer.param_groups:
        assert {p.ndim > 1 for p in group["params"]} <= {group["weight_decay"] > 0} | {True}
        assert not (group["weight_decay"] and any(p.ndim == 1 for p in group["params"]))
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.0, 0.05}


class TwoPasses(Method):
    """Notes what the engine asks of it."""

    name = title = "two passes"

    def begin_task(self, model, task, train_set, epochs):
        super().begin_task(model, task, train_set, epochs)
        self.calls = []

    def passes(self, task, epoch, epochs):
        indices = task.remain_indices
        return [Pass({"forget": indices[:16]}, 8, "max"), Pass({"remain": indices[16:]}, 8, "min")][epoch == 0 :]

    def begin_epoch(self, model, epoch):
        self.calls.append(f"epoch {epoch}")

    def loss(self, model, batch):
        self.calls.append(batch.pass_name)
        return {"total": model.head.loss(model.embed(batch.images), batch.labels)}


def test_a_method_decides_the_passes_of_each_epoch(make_recognizer, make_images, cpu):
    trainer = trainer_for(make_recognizer(), make_images(), cpu, method=TwoPasses, epochs=2)
    head = trainer.model.head.weight.clone()
    train(trainer)
    assert trainer.method.calls == ["epoch 0"] + ["min"] * 4 + ["epoch 1"] + ["max"] * 2 + ["min"] * 4
    assert steps_of_epochs(trainer.method, trainer.task, 2) == [4, 6]
    assert torch.equal(trainer.model.head.weight, head)


@pytest.mark.parametrize(("min_updates", "epochs"), [(0, 2), (10, 2), (11, 3), (16, 3), (17, 4), (100, 17)])
def test_more_epochs_for_more_updates(min_updates, epochs, make_recognizer, make_images, cpu):
    """Four steps in the first epoch, six in each further one."""
    trainer = trainer_for(make_recognizer(), make_images(), cpu, method=TwoPasses, epochs=2)
    assert epochs_for(trainer.method, trainer.task, 2, min_updates) == epochs


class Diverging(TwoPasses):
    def loss(self, model, batch):
        losses = super().loss(model, batch)
        losses["penalty"] = losses["total"] * (float("nan") if len(self.calls) == 4 else 1.0)
        return {"total": losses["total"] + losses["penalty"], "penalty": losses["penalty"]}


def test_a_loss_that_is_not_finite_ends_the_run_and_is_named(make_recognizer, make_images, cpu):
    trainer = trainer_for(make_recognizer(), make_images(), cpu, method=Diverging)
    with pytest.raises(RunError, match=r"part 'penalty' became nan in epoch 1, step 3"):
        train(trainer)


class OnDevice(torch.Tensor):
    """Counts how often it is waited for. What is copied to the CPU is plain."""

    waits = 0

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        found = super().__torch_function__(function, types, args, kwargs or {})
        if function not in (torch.Tensor.cpu, torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.__bool__):
            return found
        cls.waits += 1
        return found.as_subclass(torch.Tensor) if isinstance(found, torch.Tensor) else found


@pytest.mark.parametrize("bad", [None, 4])
def test_the_losses_of_an_epoch_are_read_in_one_go(bad):
    """Of two passes with other parts each."""
    OnDevice.waits = 0
    with Monitor(None, "test", "test", 1) as monitor:
        monitor.begin_epoch(0)
        for step in range(1, 6):
            values = torch.tensor([1.0 * step, float("nan") if step == bad else 2.0, 3.0][: 3 if step > 2 else 1])
            names = ("total", "forget", "remain")[: len(values)]
            monitor.unread.append((names, values.as_subclass(OnDevice)))
        if bad is None:
            assert monitor.end_epoch(1e-3, {}) == {"total": 4.0, "forget": 2.0, "remain": 3.0}
        else:
            with pytest.raises(RunError, match=r"part 'forget' became nan in epoch 1, step 4"):
                monitor.end_epoch(1e-3, {})
    assert OnDevice.waits == 1


def test_scalars_and_metrics_are_logged(make_recognizer, make_images, cpu, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = trainer_for(make_recognizer(), make_images(), cpu)
    with SummaryWriter(tmp_path) as writer, Monitor(writer, "task_1", "task 1", 3) as monitor:
        trainer.train(monitor, nothing, nothing)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert {"task_1/loss/total", "task_1/lr", "task_1/images_per_second"} <= set(events.Tags()["scalars"])
    assert len(events.Scalars("task_1/loss/total")) == 3


def test_an_unknown_optimizer_is_refused(make_recognizer, make_images, cpu):
    with pytest.raises(UsageError, match="--opt no_such"):
        trainer_for(make_recognizer(), make_images(), cpu, opt="no_such")


def test_derived_seeds_differ_in_every_part():
    seeds = {derived_seed(a, b, c) for a in range(4) for b in range(4) for c in range(4)}
    assert len(seeds) == 64
    assert all(0 <= seed < 2**63 for seed in seeds)
