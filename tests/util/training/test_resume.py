"""When a run is saved."""

from types import SimpleNamespace

import pytest
import torch

from util.training import resume
from util.training.resume import LastState


@pytest.fixture
def saves(monkeypatch):
    """saves(save_every, seconds of an epoch, of a save, epochs) → the epochs after which a run is saved."""

    def saves(save_every: float, epoch: float, save: float, epochs: int = 20, rank: int = 0) -> list[int]:
        now, found = [1e6], []

        def torch_save(path: object, state: int) -> None:
            found.append(state)
            now[0] += save

        monkeypatch.setattr(resume, "torch_save", torch_save)
        monkeypatch.setattr(resume, "time", SimpleNamespace(monotonic=lambda: now[0]))
        monkeypatch.setattr(resume.distributed, "rank", lambda: rank)
        position = SimpleNamespace(epoch=0)
        trainer = SimpleNamespace(position=position, epochs=epochs, parameters=[torch.ones(1)])
        trainer.state_dict = lambda: position.epoch
        last = LastState(None, save_every, False)
        for number in range(1, epochs + 1):
            now[0] += epoch
            position.epoch = number
            last.after_epoch(trainer)
        return found

    return saves


def test_saves_are_so_many_seconds_of_training_apart(saves):
    assert saves(60, epoch=10, save=1) == [1, 7, 13, 19, 20]
    assert saves(60, epoch=10, save=300) == [1, 7, 13, 19, 20]  # a slow disk does not save all the time
    assert saves(60, epoch=100, save=1, epochs=3) == [1, 2, 3]


def test_with_0_each_epoch_is_saved(saves):
    assert saves(0, epoch=1e-3, save=0, epochs=4) == [1, 2, 3, 4]


def test_the_first_process_alone_saves(saves):
    assert saves(0, epoch=1, save=0, rank=1) == []
