"""What a method needs to train on photos of other people as well, where those of kept people are few (--replay)."""

from dataclasses import replace

import torch

from data import people_folder
from data.image_set import joined
from data.tasks import ForgettingTask
from methods.base import Method, Option
from util.storage.hashes import check_strangers

REPLAY = Option("replay", "", "folder <person>/<image> of other people: the model is to see them as before")


class Replaying(Method):
    """To the method, photos of the folder `--replay` are further ones to keep. Their people have no row in the head."""

    def check(self, model, tasks, train_set):
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

    def begin_task(self, model, task, train_set, epochs):
        super().begin_task(model, self.seen(task), train_set if self.replay is None else self.seen_set, epochs)

    def passes(self, task, epoch, epochs):
        return super().passes(self.seen(task), epoch, epochs)
