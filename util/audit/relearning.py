"""Relearning: how soon a little training brings the person back."""

import copy

import numpy as np
import torch
from scipy.integrate import trapezoid
from torch import Tensor

from backbone.heads import Head
from backbone.recognizer import to_device
from util.audit.base import AuditMetric, Measurement
from util.audit.inputs import ENROLLED, TRAINED, AuditedModel, AuditTask
from util.audit.statistics import mean_statistic
from util.evaluation.evaluate import embed_images

STEPS = (0, 1, 2, 5, 10, 20, 50, 100)
BATCH, LR = 16, 1e-4  # images of each kind in a step


class Relearning(AuditMetric):
    """The accuracy on forgotten test faces while all weights are trained by AdamW: its mean over the logarithm of steps.

    relearn_k: new rows for the forgotten, from k training images each, are trained on these images and as many kept ones.
    photos_relearn_1: as relearn_1, the accuracy on the forgotten training images that are not trained on.
    relearn_kept_only: on kept images alone, with the rows of the pre-trained model (an original: its own) put back.
    """

    name = "relearning"
    family = "relearning"
    titles = {
        "relearn_1": "relearning from 1 photo",
        "relearn_5": "relearning from 5 photos",
        "photos_relearn_1": "relearning of training photos from 1 of them",
        "relearn_kept_only": "relearning from kept people's photos alone",
    }

    def measure(self, audited: AuditedModel, task: AuditTask) -> Measurement:
        forget, runs = torch.tensor(task.forget), {}
        for images in (1, ENROLLED):
            chosen, head = task.enrolled(images, 0), audited.head(task)
            length = head.weight[list(task.remain)].norm(dim=1).mean()
            head.weight[forget] = length * audited.templates(task, images, 0)[forget]
            runs[f"relearn_{images}"] = head, torch.from_numpy(np.concatenate([chosen[c] for c in task.forget]))
        head, known = audited.head(task), audited if audited.original else task.before
        for rows, theirs in zip(head.parameters(), known.head(task, own=True).parameters(), strict=True):
            rows[forget] = theirs[forget]
        runs["relearn_kept_only"] = head, torch.empty(0, dtype=torch.long)
        statistics, curves = {}, {}
        for key, (head, shown) in runs.items():
            # Of one photo each; of five, what is left of few people is little.
            new = ~np.isin(task.forget_train, shown) & (key == "relearn_1")
            hits, trained = relearn(audited, task, head, shown, task.forget_train[new])
            statistics[key] = mean_statistic(_mean_over_log_steps(hits), task.test_groups)
            if new.any():
                mean = _mean_over_log_steps(trained)
                statistics[f"{TRAINED}{key}"] = mean_statistic(mean, task.train_groups[new])
            curves[key] = {"steps": list(STEPS), "accuracy": [round(100 * float(row.mean()), 2) for row in hits]}
        return Measurement(statistics, curves)


def relearn(audited: AuditedModel, task: AuditTask, head: Head, shown: Tensor, new: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Train a copy of the model, with the rows of `head`, on `shown` training images and as many kept ones.

    Returns which of the forgotten test images, and of the training images `new`, are recognized after each of STEPS steps:
    float (steps, N) in {0, 1}.
    """
    hardware = task.hardware
    model = to_device(copy.deepcopy(audited.model), hardware).eval().requires_grad_(True)  # without dropout: repeatable
    model.head.load_state_dict(head.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    generator = torch.Generator().manual_seed(task.seed)
    labels = task.train_set.labels.cpu()
    kept = torch.isin(labels, torch.tensor(task.remain)).nonzero()[:, 0]
    half = min(BATCH, len(shown)) or BATCH
    faces = (task.test_set, task.forget_test), (task.train_set, new)
    hits, image_device = [[], []], task.train_set.images.device
    for step in range(max(STEPS) + 1):
        if step in STEPS:
            for found, (images, where) in zip(hits, faces, strict=True):
                embeddings = embed_images(model, images, hardware, where)
                with torch.no_grad():
                    answers = model.head(embeddings).argmax(dim=1).cpu()
                found.append((answers == images.labels.cpu()[where]).numpy())
        batch = kept[torch.randint(len(kept), (half,), generator=generator)]
        if len(shown):
            batch = torch.cat([shown[torch.randperm(len(shown), generator=generator)[:half]], batch])
        images = task.train_set.images[batch.to(image_device)].to(hardware.device)
        with hardware.autocast():
            loss = model.head.loss(model.embed(images), labels[batch].to(hardware.device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return tuple(np.stack(found).astype(float) for found in hits)


def _mean_over_log_steps(hits: np.ndarray) -> np.ndarray:
    """Of each image, the mean of (steps, N) over log(1 + step), by the trapezoidal rule."""
    return trapezoid(hits, np.log1p(STEPS), axis=0) / np.log1p(STEPS[-1])
