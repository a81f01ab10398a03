"""A run of forgetting tasks, one after another: train, evaluate, and write down what each of them left."""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter

from backbone.recognizer import Recognizer
from data.image_set import ImageSet
from data.tasks import ForgettingTask
from methods.base import Method
from util.evaluation.evaluate import accuracies_after, accuracies_before, predict
from util.report.results import load_results, new_results, task_entry
from util.report.tables import Comparison, percent
from util.runtime.errors import RunError
from util.runtime.files import save_tensors, write_json, write_text
from util.storage.checkpoint import (
    Checkpoint,
    load_checkpoint,
    load_weights,
    save_checkpoint,
    save_published,
    torch_load,
    torch_save,
)
from util.storage.folders import RunFolder
from util.training.engine import Optimization, Trainer, derived_seed, epochs_of_task
from util.training.monitor import Monitor, open_writer
from util.training.record import Recorder
from util.training.resume import LastState


class ContinualRun:
    """The model on its way through the tasks; `folder` is where everything is left."""

    def __init__(
        self,
        args: argparse.Namespace,
        method: Method,
        model: Recognizer,
        data: tuple[ImageSet, ImageSet],
        tasks: list[ForgettingTask],
        folder: RunFolder,
    ) -> None:
        self.args, self.method, self.model, self.tasks, self.folder = args, method, model, tasks, folder
        self.train_set, self.test_set = data
        self.hardware = method.hardware
        self.parameters = model.num_parameters()
        self.forgotten: list[list[int]] = []
        self.results: dict | None = None
        self.settings = Optimization.of(args)
        self.last = LastState(folder.last, args)
        self.recorder = Recorder(args, method.hardware, data)

    def run(self) -> dict:
        """Carry out the tasks that are left, and return the content of results.json.

        Raises RunError if what the run is to continue from does not belong to it, or if a loss is not finite.
        """
        self.pretrained = predict(self.model, self.test_set, self.hardware)
        self.method.begin_run(self.model, self.tasks, self.train_set)
        if self.args.resume and self.folder.results.exists():
            self.results = load_results(self.folder.results)
            self._enter(self.folder.checkpoint(self.results["tasks"][-1]["task"]))
        elif self.args.resume_from is not None:
            self._enter(self.args.resume_from)
        with open_writer(self.folder.path) as writer:
            for task in self.tasks[len(self.forgotten) :]:
                self._forget(task, writer)
            self._draw(writer)
        return self.results

    def _enter(self, path: Path) -> None:
        """Take over a model that has already forgotten this run's first tasks."""
        checkpoint = load_checkpoint(path)
        if checkpoint.forgotten != [list(task.forget) for task in self.tasks[: len(checkpoint.forgotten)]]:
            raise RunError(f"{path} has not forgotten what the first tasks of this run forget; use --overwrite")
        load_weights(self.model, checkpoint.model.state_dict(), path)
        self.forgotten = checkpoint.forgotten
        state = self.folder.method_state(len(self.forgotten), path.parent)
        if state.exists():
            try:
                self.method.load_state_dict(torch_load(state).get(self.method.name, {}))
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise RunError(f"{state}: damaged: {type(error).__name__} {error}") from None

    def _forget(self, task: ForgettingTask, writer: SummaryWriter) -> None:
        self.hardware.reset_peak_memory()
        start = time.perf_counter()
        self.recorder.begin(self.model)
        trainer = self._trainer(task)
        label = f"task {task.number}/{len(self.tasks)} {task.setting}"
        bar = f"{self.method.title} {label}"
        with Monitor(writer, f"task_{task.number}", bar, trainer.settings.epochs, trainer.epoch) as monitor:
            done = trainer.train(monitor, lambda trainer: self._after_epoch(trainer, task, writer), self.last.save)
        left = self.method.end_task(self.model)
        self.forgotten = [*self.forgotten, list(task.forget)]
        trained = time.perf_counter()

        before = accuracies_before(self.pretrained, task)
        after = accuracies_after(predict(self.model, self.test_set, self.hardware), task, before)
        costs = {
            "train_seconds": round(trained - start, 3),
            "eval_seconds": round(time.perf_counter() - trained, 3),
            "images_per_second": round(done.images_per_second, 1),
            "peak_memory_mb": round(self.hardware.peak_memory_mb(), 1),
        }
        self._keep(task, left, task_entry(task, before, after, left.get("groups"), costs))
        for name, value in after.items():
            if value is not None:
                writer.add_scalar(f"tasks/{name}", value, task.number)
        self._report(label, before, after, costs)

    def _trainer(self, task: ForgettingTask) -> Trainer:
        """Prepare a task, and go to where an interrupted run left it."""
        # Before begin_task draws anything, so that a task does not depend on how the earlier ones were run.
        torch.manual_seed(derived_seed(self.args.seed, task.number))
        self.method.begin_task(self.model, task, self.train_set)
        self.model.to(self.hardware.device)
        if self.results is None:
            self.results = self._new_results()
        steps = sum(plan.steps for plan in self.method.passes(0))
        settings = replace(self.settings, epochs=epochs_of_task(self.args, steps))
        trainer = Trainer(self.model, self.method, self.train_set, settings, self.args.seed, task.number)
        self.last.restore(trainer)
        return trainer

    def _new_results(self) -> dict:
        architecture, trainable = self.model.architecture, self.model.num_trainable()
        model = {
            "name": architecture.model,
            "parameters": self.parameters,
            "trainable": trainable,
            "tunable_ratio": round(trainable / self.parameters, 6),
        }
        accuracies = self.pretrained.accuracies(range(len(self.test_set.classes)))
        return new_results(self.method.name, self.args.seed, self.train_set, self.test_set, model, accuracies)

    def _after_epoch(self, trainer: Trainer, task: ForgettingTask, writer: SummaryWriter) -> None:
        self.last.after_epoch(trainer)
        if self.args.eval_every and trainer.epoch % self.args.eval_every == 0:
            now = predict(self.model, self.test_set, self.hardware)
            for name, value in accuracies_after(now, task, accuracies_before(self.pretrained, task)).items():
                if value is not None:
                    writer.add_scalar(f"task_{task.number}/test/{name}", value, trainer.epoch)

    def _keep(self, task: ForgettingTask, left: dict, entry: dict) -> None:
        """Write a finished task. results.json comes last: a task it names has all of its files."""
        metadata = {"method": self.method.name, "task": str(task.number), "setting": task.setting}
        if "adapters" in left:
            save_tensors(self.folder.adapters(task.number), left["adapters"], metadata)
        if "deposit" in left:
            save_tensors(self.folder.deposit(task.number), left["deposit"], metadata)
        if state := self.method.state_dict():
            torch_save(self.folder.method_state(task.number), {self.method.name: state})
        info = {"dataset": self.train_set.name, "method": self.method.name, "task": task.number, **entry["after"]}
        checkpoint = Checkpoint(self.model, self.train_set.classes, self.forgotten, info)
        save_checkpoint(self.folder.checkpoint(task.number), checkpoint)
        if self.args.published_layout:
            save_published(self.folder.published(task.number), self.model)
        self.recorder.write(self.folder, task, self.model, entry)
        self.results["tasks"].append(entry)
        write_text(self.folder.table, Comparison([self.results], [self.method.title]).markdown() + "\n")
        write_json(self.folder.results, self.results)

    def _draw(self, writer: SummaryWriter) -> None:
        # matplotlib takes a second to import: not before training has begun.
        from util.report.figures import run_figure, save_figure

        figure = run_figure(self.results)
        writer.add_figure("run", figure, close=False)
        save_figure(figure, self.folder.figure)

    def _report(self, label: str, before: dict, after: dict, costs: dict) -> None:
        old = "" if after["acc_old"] is None else f", Acc_o {percent(after['acc_old'])}"
        print(
            f"{label}: H {percent(after['h_mean'])}, Acc_r {percent(before['acc_remain'])} → "
            f"{percent(after['acc_remain'])}, Acc_f {percent(before['acc_forget'])} → {percent(after['acc_forget'])}{old}"
            f" · {costs['train_seconds']:.0f} s, {costs['images_per_second']:.0f} images/s",
            flush=True,
        )
