"""A run of forgetting tasks, one after another: train, evaluate, and write down what each of them left."""

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from backbone.published import to_published
from backbone.recognizer import Recognizer
from data.copies import DIGITS
from data.image_set import ImageSet
from data.pairs import FacePairs
from data.tasks import ForgettingTask
from methods.base import Method, TaskOutput
from util.evaluation.evaluate import accuracies_after, accuracies_before, predict
from util.evaluation.metrics import MUCH_LOST
from util.evaluation.verification import pair_benchmark
from util.report.results import load_results, new_results, task_entry
from util.report.tables import Comparison, percent
from util.runtime.errors import RunError
from util.runtime.files import readable, save_tensors, write_json, write_text
from util.storage.checkpoint import Checkpoint, load_checkpoint, load_weights, save_checkpoint, torch_load, torch_save
from util.storage.folders import RunFolder
from util.training.deletion_record import Recorder
from util.training.engine import Trainer
from util.training.monitor import Monitor, log_scalars, open_writer
from util.training.optim import derived_seed, epochs_for
from util.training.resume import LastState


@dataclass
class ContinualRun:
    """A model on its way through tasks, with a training and a test set. The first `earlier` tasks are done.

    `pairs`: verification benchmarks to measure before and after each task, by name.
    """

    args: argparse.Namespace
    model: Recognizer
    method: Method
    data: tuple[ImageSet, ImageSet]
    tasks: list[ForgettingTask]
    earlier: int
    pairs: dict[str, FacePairs]

    def images_shown(self) -> int:
        """How many images the tasks that are left train on, counted as often as they are seen."""
        images = 0
        for task in self.tasks[self.earlier :]:
            epochs = epochs_for(self.method, task, self.args.epochs, self.args.min_updates)
            plans = [plan for epoch in range(epochs) for plan in self.method.passes(task, epoch, epochs)]
            images += sum(plan.steps * sum(plan.sizes.values()) for plan in plans)
        return images

    def run(self, folder: RunFolder, resume: bool, config: dict) -> dict:
        """Carry out the tasks that are left, leave everything in `folder`, and return the content of results.json.

        `config` is the content of config.json. An earlier run in the folder is set aside unless it is resumed.
        """
        self.folder, self.results, self.forgotten_digests = folder, None, []
        self.train_set, self.test_set = self.data
        self.num_parameters = self.model.num_parameters()
        self.last = LastState(folder.last, self.args.save_every, resume)
        self.recorder = Recorder(self.args, self.method.hardware, self.data, resume)
        self.predictions_before = predict(self.model, self.test_set, self.method.hardware)
        self.pairs_before = pair_benchmark(self.model, self.pairs, self.method.hardware)
        self.method.begin_run(self.model, self.tasks[self.earlier :], self.train_set)
        done = 0
        if resume and folder.results.exists():
            self.results = load_results(folder.results)
            done = self._enter(folder.checkpoint(self.results["tasks"][-1]["task"]))
        elif self.args.resume_from is not None:
            done = self._enter(self.args.resume_from)
        if not resume:  # all that can be refused has been
            folder.set_aside()
        write_json(folder.config, config)
        with open_writer(folder.path) as self.writer:
            for task in self.tasks[done:]:
                self._forget(task)
            self._finish()
        folder.discard()
        return self.results

    def _enter(self, path: Path) -> int:
        """Take over a model that has already forgotten this run's first tasks. Returns how many."""
        checkpoint = load_checkpoint(path)
        done = len(checkpoint.forgotten)
        if checkpoint.forgotten != self._forgotten(done):
            raise RunError(f"{path} has not forgotten what the first tasks of this run forget; use --overwrite")
        load_weights(self.model, checkpoint.model.state_dict(), path)
        self.forgotten_digests = checkpoint.info.get("forgotten_digests", [])
        state = self.folder.method_state(done, path.parent)
        if state.exists():
            with readable(state):
                self.method.load_state_dict(torch_load(state).get(self.method.name, {}))
        return done

    def _forgotten(self, done: int) -> list[list[int]]:
        return [list(task.forget) for task in self.tasks[:done]]

    def _forget(self, task: ForgettingTask) -> None:
        hardware = self.method.hardware
        self.recorder.begin(self.model)
        hardware.reset_peak_memory()
        start = time.perf_counter()
        trainer = self._trainer(task)
        label = f"task {task.number}/{len(self.tasks)} {task.setting}"
        progress = f"{self.method.title} {label}", trainer.epochs, trainer.position.epoch
        with Monitor(self.writer, f"task_{task.number}", *progress) as monitor:
            speed = trainer.train(monitor, self.last.save, self._after_epoch)
        output = self.method.end_task(self.model)
        trained = time.perf_counter()

        before = accuracies_before(self.predictions_before, task)
        after = accuracies_after(predict(self.model, self.test_set, hardware), task, before)
        pairs = {"before": self.pairs_before, "after": pair_benchmark(self.model, self.pairs, hardware)}
        costs = {
            "train_seconds": round(trained - start, 3),
            "eval_seconds": round(time.perf_counter() - trained, 3),
            "images_per_second": round(speed, 1),
            "peak_memory_mb": round(hardware.peak_memory_mb(), 1),
        }
        entry = task_entry(task, before, after, output.groups, costs) | ({"pairs": pairs} if self.pairs else {})
        self._keep(task, output, entry)
        log_scalars(self.writer, "tasks", after, task.number)
        more = "" if after["acc_old"] is None else f", Acc_o {percent(after['acc_old'])}"
        for name, found in pairs["after"].items():
            more += f", {name} {percent(pairs['before'][name]['accuracy'])} → {percent(found['accuracy'])}"
        print(
            f"{label}: H {percent(after['h_mean'])}, Acc_r {percent(before['acc_remain'])} → "
            f"{percent(after['acc_remain'])}, Acc_f {percent(before['acc_forget'])} → {percent(after['acc_forget'])}{more}"
            f" · {costs['train_seconds']:.0f} s, {costs['images_per_second']:.0f} images/s",
            flush=True,
        )
        self._warn_of_ruin(task, before["acc_remain"], after["acc_remain"])

    def _warn_of_ruin(self, task: ForgettingTask, before: float | None, after: float | None) -> None:
        if before is not None and before - after > MUCH_LOST:
            message = f"warning: task {task.number} cost kept people {before - after:.0f} points of accuracy"
            print(f"{message}: try a lower --lr than {self.args.lr:g}", file=sys.stderr)

    def _trainer(self, task: ForgettingTask) -> Trainer:
        """Begin a task, or go to where an interrupted run left it."""
        epochs = epochs_for(self.method, task, self.args.epochs, self.args.min_updates)
        # Before begin_task draws anything, so that a task does not depend on how the earlier ones were run.
        torch.manual_seed(derived_seed(self.args.seed, task.number))
        self.method.begin_task(self.model, task, self.train_set, epochs)
        self.model.to(self.method.hardware.device)
        if self.results is None:
            self.results = self._new_results()
        trainer = Trainer(self.model, self.method, task)
        self.last.restore(trainer)
        return trainer

    def _new_results(self) -> dict:
        trainable = self.model.num_trainable()
        model = {
            "name": self.model.architecture.model,
            "parameters": self.num_parameters,
            "trainable": trainable,
            "tunable_ratio": round(trainable / self.num_parameters, 6),
        }
        accuracies = self.predictions_before.accuracies(range(len(self.test_set.classes)))
        return new_results(self.method.name, self.args.seed, self.train_set, self.test_set, model, accuracies)

    def _after_epoch(self, trainer: Trainer) -> None:
        self.last.after_epoch(trainer)
        epoch, task = trainer.position.epoch, trainer.task
        if self.args.eval_every and epoch % self.args.eval_every == 0:
            now = predict(self.model, self.test_set, self.method.hardware)
            accuracies = accuracies_after(now, task, accuracies_before(self.predictions_before, task))
            log_scalars(self.writer, f"task_{task.number}/test", accuracies, epoch)

    def _keep(self, task: ForgettingTask, output: TaskOutput, entry: dict) -> None:
        """Write a finished task. results.json comes last: a task it names has all of its files."""
        metadata = {"method": self.method.name, "task": str(task.number), "setting": task.setting}
        for kind, tensors in output.files.items():
            save_tensors(self.folder.task_file(kind, task.number), tensors, metadata)
        if state := self.method.state_dict():
            torch_save(self.folder.method_state(task.number), {self.method.name: state})
        info = {"dataset": self.train_set.name, "method": self.method.name, "task": task.number, **entry["after"]}
        info["class_digests"] = self.train_set.contents
        for images in self.data:
            labelled = zip(images.labels.tolist(), images.digests, strict=False)
            self.forgotten_digests += [digest[:DIGITS] for c, digest in labelled if c in task.forget]
        info["forgotten_digests"] = self.forgotten_digests
        checkpoint = Checkpoint(self.model, self.train_set.classes, self._forgotten(task.number), info)
        save_checkpoint(self.folder.checkpoint(task.number), checkpoint)
        if self.args.published_layout:
            torch_save(self.folder.task_file("published", task.number), to_published(self.model))
        self.recorder.write(self.folder, task, self.model, entry, self.method.replay)
        self.results["tasks"].append(entry)
        write_text(self.folder.path / "table.md", Comparison([self.results]).markdown() + "\n")
        write_json(self.folder.results, self.results)

    def _finish(self) -> None:
        # matplotlib takes a second to import: not before training has begun.
        from util.report.figures import run_figure, save_figure

        figure = run_figure(Comparison([self.results]))
        if self.writer is not None:
            self.writer.add_figure("run", figure, close=False)
        save_figure(figure, self.folder.path / "figure.png")
        self.results["finished"] = True
        write_json(self.folder.results, self.results)
