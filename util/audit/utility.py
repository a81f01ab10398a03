"""Utility, beside the figures: what the unlearned model still does for the people it is to know."""

import numpy as np
import torch
import torch.nn.functional as F

from util.audit.subject import DRAWS, ENROLLED, Scene, Subject
from util.evaluation.verification import verify

PAIRS = 20_000
FAR = 0.01


def utility(subject: Subject, scene: Scene) -> dict[str, float | None]:
    """What `recognition` gives, and the true accept rate at FAR 1% of *old templates*: enrolled with the pre-trained model
    and searched with this one, since nobody re-enrols a million people. All of kept faces, in percent."""
    labels = scene.test_set.labels.cpu()[scene.remain_test]
    embeddings, remain, accepted = subject.test[scene.remain_test], torch.tensor(scene.remain), []
    for draw in range(DRAWS):
        similarity = F.normalize(embeddings) @ scene.before.templates(scene, ENROLLED, draw)[remain].T
        own = labels[:, None] == remain
        threshold = np.quantile(similarity[~own].numpy(), 1 - FAR)
        accepted.append((similarity[own] > threshold).float().mean().item())
    return recognition(subject, scene) | {"old_templates_tar_1pct": 100 * float(np.mean(accepted))}


def recognition(subject: Subject, scene: Scene) -> dict[str, float | None]:
    """Accuracy among all rows (templates where it has none) and verification AUC of kept faces, in percent."""
    labels, embeddings = scene.test_set.labels.cpu()[scene.remain_test], subject.test[scene.remain_test]
    right = subject.logits(embeddings, *subject.rows(scene, own=True)).argmax(dim=1) == labels
    pairs = verify(embeddings, labels, PAIRS, scene.seed)
    auc = None if pairs is None else pairs["auc"]
    return {"acc_remain": 100 * right.float().mean().item(), "verification_auc_remain": auc}
