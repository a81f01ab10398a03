"""What people would rather look at than read: a map of the embeddings, and the nearest faces of a few forgotten ones."""

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.manifold import TSNE
from torch import Tensor

from util.audit.audit import Audit
from util.audit.subject import Subject

POINTS = 300  # most of each group on the map
FACES, NEIGHBOURS = 6, 3


def pictures(audit: Audit) -> dict:
    """{"map": {model: {group: (N, 2)}}, "neighbours": [{"face": uint8 (3, H, W), "name", model: [face, …]}, …]}

    The models are "before", "after" and "never seen" (the first reference).
    """
    scene = audit.scene
    models = {"before": scene.before, "after": audit.after, "never seen": scene.references[0]}
    return {
        "map": {name: _map(subject, audit) for name, subject in models.items()},
        "neighbours": [_neighbours(face, models, audit) for face in _faces(models, audit)],
    }


def _map(subject: Subject, audit: Audit) -> dict[str, np.ndarray]:
    scene = audit.scene
    groups = {"forgotten": subject.test[scene.forget_test], "kept": subject.test[scene.remain_test]}
    groups |= {"never seen": subject.unknown} if scene.unseen is not None else {}
    groups = {name: _some(embeddings, scene.seed) for name, embeddings in groups.items()}
    points = F.normalize(torch.cat([*groups.values()])).numpy()
    tsne = TSNE(init="pca", perplexity=min(30, (len(points) - 1) / 3), random_state=scene.seed)
    placed = np.split(tsne.fit_transform(points), np.cumsum([len(group) for group in groups.values()])[:-1])
    return dict(zip(groups, placed, strict=True))


def _some(rows: Tensor, seed: int) -> Tensor:
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:POINTS]]


def _faces(models: dict[str, Subject], audit: Audit) -> list[int]:
    """Positions of a few forgotten test faces: those where the models differ most in how many neighbours are of the same
    person, and of different people as far as there are."""
    scene = audit.scene
    labels, own = scene.train_set.labels.cpu(), scene.forget_labels[:, None]
    same = []
    for subject in models.values():
        similarity = F.normalize(subject.test[scene.forget_test]) @ F.normalize(subject.train).T
        same.append((labels[similarity.topk(NEIGHBOURS).indices] == own).sum(dim=1))
    differ = torch.stack(same).amax(dim=0) - torch.stack(same).amin(dim=0)
    order = differ.argsort(descending=True, stable=True)
    first = np.sort(np.unique(scene.who[order.numpy()], return_index=True)[1])
    chosen = [*first, *np.setdiff1d(np.arange(len(order)), first)][:FACES]
    return scene.forget_test[order[chosen]].tolist()


def _neighbours(face: int, models: dict[str, Subject], audit: Audit) -> dict:
    """The training images, of everybody, that each model finds most like a test face."""
    train, test = audit.scene.train_set, audit.scene.test_set
    label = test.labels[face].item()
    row = {"face": test.images[face].cpu().numpy(), "name": test.classes[label]}
    for name, subject in models.items():
        similarity, nearest = (F.normalize(subject.train) @ F.normalize(subject.test[face], dim=0)).topk(NEIGHBOURS)
        row[name] = [
            {
                "face": train.images[position].cpu().numpy(),
                "name": train.classes[train.labels[position]],
                "same": train.labels[position].item() == label,
                "cosine": cosine,
            }
            for position, cosine in zip(nearest.tolist(), similarity.tolist(), strict=True)
        ]
    return row
