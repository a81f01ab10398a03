"""Logits → accuracies of every group of classes, without and with margin, from one sweep over the images.

Without margin the largest cosine wins. With margin, as published, the true class must still win after its margin has been
taken off, for which the head needs the label.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from backbone.recognizer import Recognizer
from data.image_set import ImageSet
from data.tasks import ForgettingTask
from util.evaluation.metrics import MARGINS, h_mean, top1
from util.runtime.hardware import Hardware

LOGITS = 1 << 26  # at once


@dataclass(frozen=True)
class Predictions:
    """What a model says of N images: true and predicted class (N,), and whether that is right, bool (N,)."""

    labels: Tensor
    predicted: Tensor
    correct: Tensor
    margin_correct: Tensor

    def among(self, classes: Iterable[int]) -> Tensor:
        """Which images are of these classes: bool (N,)."""
        return torch.isin(self.labels, torch.tensor(sorted(classes), dtype=self.labels.dtype))

    def accuracies(self, classes: Iterable[int]) -> dict[str, float | None]:
        """{"acc": %, "margin_acc": %} over the images of `classes`; None where there are no such images."""
        chosen = self.among(classes)
        return {"acc": top1(self.correct, chosen), "margin_acc": top1(self.margin_correct, chosen)}


@torch.inference_mode()
def map_images(
    model: Recognizer,
    function: Callable[[Tensor], Tensor],
    image_set: ImageSet,
    hardware: Hardware,
    indices: Tensor | None = None,
) -> Tensor:
    """`function` of the images (of those at `indices`), uint8 (B, 3, H, W) → (B, …), with `model` in evaluation mode.

    The result is float32, on the device.
    """
    indices = torch.arange(len(image_set)) if indices is None else indices
    was_training = model.training
    model.eval()
    chunks = []
    for rows in indices.to(image_set.images.device).split(hardware.eval_batch):
        # Large batches, the last of another shape: there is little to gain from compiling for them.
        with hardware.autocast(), hardware.eager():
            chunks.append(function(image_set.images[rows].to(hardware.device, non_blocking=True)).float())
    model.train(was_training)
    return torch.cat(chunks)


def embed_images(model: Recognizer, image_set: ImageSet, hardware: Hardware, indices: Tensor | None = None) -> Tensor:
    """Embeddings float32 (N, dim) of the images (of those at `indices`), in evaluation mode, on the device."""
    return map_images(model, model.embed, image_set, hardware, indices)


def predict(model: Recognizer, image_set: ImageSet, hardware: Hardware, indices: Tensor | None = None) -> Predictions:
    labels = image_set.labels if indices is None else image_set.labels[indices.to(image_set.labels.device)]
    return predictions_of(model, embed_images(model, image_set, hardware, indices), labels)


@torch.inference_mode()
def predictions_of(model: Recognizer, embeddings: Tensor, labels: Tensor) -> Predictions:
    labels = labels.to(embeddings.device)
    chunks = []
    count = max(1, LOGITS // len(model.head.weight))  # images × people would not fit for a hundred thousand of each
    for part, own in zip(embeddings.split(count), labels.split(count), strict=True):
        logits = model.head(part)
        predicted, its_own = logits.argmax(dim=1), logits.gather(1, own[:, None])
        # A margin changes the own logit alone: it is enough to compare that with the largest of the others.
        logits[torch.arange(len(own), device=own.device), own] = -torch.inf
        two = torch.cat([its_own, logits.amax(dim=1, keepdim=True)], dim=1)
        chunks.append(torch.stack([predicted, model.head.add_margin(two, torch.zeros_like(own)).argmax(dim=1)]))
    predicted, beaten = torch.cat(chunks, dim=1)
    return Predictions(labels.cpu(), predicted.cpu(), (predicted == labels).cpu(), (beaten == 0).cpu())


def accuracies_before(pretrained: Predictions, task: ForgettingTask) -> dict[str, float | None]:
    """The pre-trained model on this task's classes: the paper's "Pre-train" row."""
    return _accuracies(pretrained, task, ("remain", "forget"))


def accuracies_after(now: Predictions, task: ForgettingTask, before: dict) -> dict[str, float | None]:
    """All accuracies after a task, and H against the pre-trained model's accuracies `before`."""
    after = _accuracies(now, task, ("remain", "forget", "old", "missing"))
    for margin in MARGINS:
        forget = f"{margin}acc_forget"
        after[f"{margin}h_mean"] = h_mean(after[f"{margin}acc_remain"], after[forget], before[forget])
    return after


def _accuracies(predictions: Predictions, task: ForgettingTask, groups: Iterable[str]) -> dict[str, float | None]:
    found = {group: predictions.accuracies(getattr(task, group)) for group in groups}
    return {f"{margin}acc_{group}": found[group][f"{margin}acc"] for margin in MARGINS for group in groups}
