"""Which faces a page shows."""

from types import SimpleNamespace

import numpy as np
import torch

from util.audit.pictures import _faces


def test_faces_are_those_where_the_models_differ_of_different_people():
    labels = torch.tensor([0] * 3 + [1] * 3)
    towards = torch.eye(2)  # person 0 lies along the first axis, person 1 along the second
    train = towards[labels]

    def subject(*nearest: int) -> SimpleNamespace:  # whom each of the four test faces lies at
        return SimpleNamespace(train_embeddings=train, test_embeddings=towards[list(nearest)])

    task = SimpleNamespace(forget_test=torch.arange(4), forget_labels=torch.tensor([0, 0, 1, 1]))
    task.test_groups, task.train_set = np.array([0, 0, 1, 1]), SimpleNamespace(labels=labels)
    models = {"before": subject(0, 0, 1, 1), "after": subject(0, 1, 0, 1)}  # differ on the second and the third
    assert _faces(models, task) == [1, 2, 0, 3]
