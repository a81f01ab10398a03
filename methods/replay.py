"""What a method needs to train on photos of other people as well, where those of kept people are few (--replay)."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from backbone.recognizer import Recognizer
from data import people_folder
from data.batches import Pass
from data.image_set import ImageSet, joined
from data.tasks import ForgettingTask
from methods.base import Method, Option
from util.storage.hashes import check_strangers

REPLAY = Option("replay", "", "folder <person>/<image> of other people: the model is to see them as before")


class Replaying(Method):
    """To the method, photos of the folder `--replay` are further ones to keep. Their people have no row in the head."""

    def check(self, model: Recognizer, tasks: Sequence[ForgettingTask], train_set: ImageSet) -> None:
        self.seen_set = train_set
        if self.args.replay:
            about = model.architecture
            self.replay = people_folder(self.args, self.args.replay, about.image_size, about.crop_pct)
            check_strangers(self.replay, train_set, option="--replay")
            self.seen_set = joined(train_set, self.replay)

    def seen(self, task: ForgettingTask) -> ForgettingTask:
        if self.replay is None:
            return task
        more = torch.arange(len(self.seen_set))[-len(self.replay) :]
        return replace(task, remain_indices=torch.cat([task.remain_indices, more]))

    def begin_task(self, model: Recognizer, task: ForgettingTask, train_set: ImageSet, epochs: int) -> None:
        super().begin_task(model, self.seen(task), train_set if self.replay is None else self.seen_set, epochs)

    def passes(self, task: ForgettingTask, epoch: int, epochs: int) -> list[Pass]:
        return super().passes(self.seen(task), epoch, epochs)
