"""Utility: kept faces recognized, verified, and found by templates of the pre-trained model."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from tests.util.audit.conftest import array, gallery, make_up, pairs_of, quantile, unit
from util.audit.utility import utility


def test_kept_faces_by_hand():
    audited, task = make_up(noise=2.0)
    drift = torch.randn(audited.test_embeddings.shape, generator=torch.Generator().manual_seed(4))
    after = replace(audited)
    after.train_embeddings, after.test_embeddings = audited.train_embeddings, audited.test_embeddings + drift
    found = utility(after, task)

    faces, labels = array(after.test_embeddings)[task.remain_test], task.test_set.labels[task.remain_test].numpy()
    cosines = unit(faces) @ unit(array(after.model.head.weight)).T
    assert found["acc_remain"] == pytest.approx(100 * (cosines.argmax(axis=1) == labels).mean())
    pairs = pairs_of(faces, labels)
    auc = roc_auc_score([a == b for _, a, b in pairs], [score for score, _, _ in pairs])
    assert found["verification_auc_remain"] == pytest.approx(100 * auc)

    accepted = []
    for draw in range(10):
        old = gallery(audited, task, 5, draw)
        own = [old[label] @ unit(face) for face, label in zip(faces, labels, strict=True)]
        others = [old[c] @ unit(face) for face, label in zip(faces, labels, strict=True) for c in task.remain if c != label]
        threshold = quantile(others, 0.99)
        accepted.append(np.mean([score > threshold for score in own]))
    assert found["old_templates_tar_1pct"] == pytest.approx(100 * np.mean(accepted))
    assert 20 < found["old_templates_tar_1pct"] < 95
    assert 20 < found["acc_remain"] < 100


def test_a_model_that_turned_all_embeddings_around_fails_with_old_templates_alone():
    audited, task = make_up(noise=0.3)
    before = utility(audited, task)
    after = replace(audited)
    rotation, _ = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(1)))
    after.train_embeddings, after.test_embeddings = audited.train_embeddings @ rotation, audited.test_embeddings @ rotation
    found = utility(after, task)
    assert found["verification_auc_remain"] == pytest.approx(before["verification_auc_remain"], abs=1e-3)
    assert before["old_templates_tar_1pct"] > 99 > 30 > found["old_templates_tar_1pct"]


def test_without_pairs_there_is_no_verification():
    audited, task = make_up(test=(1, 5, 1, 1, 5, 1, 5, 1))
    found = utility(audited, task)
    assert found["verification_auc_remain"] is None
    assert found["acc_remain"] >= 0
