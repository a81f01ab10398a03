"""What people would rather look at than read: a map of the embeddings, and the nearest faces of a few forgotten ones."""

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.manifold import TSNE
from torch import Tensor

from util.audit.audit import Audit
from util.audit.inputs import AuditedModel, AuditTask

POINTS = 300  # most of each group on the map
FACES, NEIGHBOURS = 6, 3


def pictures(audit: Audit) -> dict:
    """Of the models "before", "after" and "never seen" (the first reference): {"map": {model: {group: points (N, 2)}},
    "people": name of each forgotten point, "neighbours": [{"face": uint8 (3, H, W), "name", model: [{"face", "name", "same",
    "cosine"}, …]}, …]}"""
    task = audit.task
    models = {"before": task.before, "after": audit.after, "never seen": task.references[0]}
    labels = _some(task.forget_labels, task.seed).tolist()
    return {
        "map": {name: _map(audited, task) for name, audited in models.items()},
        "people": [task.train_set.classes[label] for label in labels],
        "neighbours": [_neighbours(face, models, task) for face in _faces(models, task)],
    }


def _map(audited: AuditedModel, task: AuditTask) -> dict[str, np.ndarray]:
    groups = {"forgotten": audited.test_embeddings[task.forget_test], "kept": audited.test_embeddings[task.remain_test]}
    groups |= {"never seen": audited.stranger_embeddings} if task.stranger_set is not None else {}
    groups = {name: _some(embeddings, task.seed) for name, embeddings in groups.items()}
    points = F.normalize(torch.cat([*groups.values()])).numpy()
    tsne = TSNE(init="pca", perplexity=min(30, (len(points) - 1) / 3), random_state=task.seed)
    placed = np.split(tsne.fit_transform(points), np.cumsum([len(group) for group in groups.values()])[:-1])
    return dict(zip(groups, placed, strict=True))


def _some(rows: Tensor, seed: int) -> Tensor:
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:POINTS]]


def _faces(models: dict[str, AuditedModel], task: AuditTask) -> list[int]:
    """Positions of a few forgotten test faces: those where the models differ most in how many neighbours are of the same
    person, and of different people as far as there are."""
    labels, own = task.train_set.labels.cpu(), task.forget_labels[:, None]
    same = []
    for audited in models.values():
        similarity = F.normalize(audited.test_embeddings[task.forget_test]) @ F.normalize(audited.train_embeddings).T
        same.append((labels[similarity.topk(NEIGHBOURS).indices] == own).sum(dim=1))
    differ = torch.stack(same).amax(dim=0) - torch.stack(same).amin(dim=0)
    order = differ.argsort(descending=True, stable=True)
    first = np.sort(np.unique(task.test_groups[order.numpy()], return_index=True)[1])
    chosen = [*first, *np.setdiff1d(np.arange(len(order)), first)][:FACES]
    return task.forget_test[order[chosen]].tolist()


def _neighbours(face: int, models: dict[str, AuditedModel], task: AuditTask) -> dict:
    """The training images of anybody that each model finds most like a test face."""
    train, test = task.train_set, task.test_set
    label = test.labels[face].item()
    row = {"face": test.images[face].cpu().numpy(), "name": test.classes[label]}
    for name, audited in models.items():
        similarity = F.normalize(audited.train_embeddings) @ F.normalize(audited.test_embeddings[face], dim=0)
        cosines, nearest = similarity.topk(NEIGHBOURS)
        row[name] = []
        for cosine, position in zip(cosines.tolist(), nearest.tolist(), strict=True):
            own = train.labels[position].item()
            near = {"face": train.images[position].cpu().numpy(), "name": train.classes[own]}
            row[name].append(near | {"same": own == label, "cosine": cosine})
    return row
