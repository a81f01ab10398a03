"""Utility, beside the metrics: what the unlearned model still does for the people it is to know."""

import numpy as np
import torch
import torch.nn.functional as F

from util.audit.inputs import DRAWS, ENROLLED, AuditedModel, AuditTask
from util.evaluation.verification import verify

PAIRS = 20_000
FAR = 0.01
PAIRS_OF = "pairs_"  # what the keys of benchmarks begin with


def utility(audited: AuditedModel, task: AuditTask) -> dict[str, float | None]:
    """What `recognition` gives, and the true accept rate at FAR 1% of *old templates*: enrolled with the pre-trained model
    and searched with this one, since nobody re-enrols a million people. All of kept faces, in percent."""
    labels = task.test_set.labels.cpu()[task.remain_test]
    embeddings, remain, accepted = audited.test_embeddings[task.remain_test], torch.tensor(task.remain), []
    for draw in range(DRAWS):
        similarity = F.normalize(embeddings) @ task.before.templates(task, ENROLLED, draw)[remain].T
        own = labels[:, None] == remain
        threshold = np.quantile(similarity[~own].numpy(), 1 - FAR)
        accepted.append((similarity[own] > threshold).float().mean().item())
    return recognition(audited, task) | {"old_templates_tar_1pct": 100 * float(np.mean(accepted))}


def recognition(audited: AuditedModel, task: AuditTask) -> dict[str, float | None]:
    """Accuracy among all rows (templates where it has none) and verification AUC of kept faces, in percent."""
    labels, embeddings = task.test_set.labels.cpu()[task.remain_test], audited.test_embeddings[task.remain_test]
    right = audited.head(task, own=True)(embeddings).argmax(dim=1) == labels
    pairs = verify(embeddings, labels, PAIRS, task.seed)
    auc = None if pairs is None else pairs["auc"]
    return {"acc_remain": 100 * right.float().mean().item(), "verification_auc_remain": auc}
