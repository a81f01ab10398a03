"""What the methods with a teacher share: its outputs, computed once a task, and the distance between two outputs."""

import copy
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from backbone.recognizer import Recognizer
from data.image_set import ImageSet
from methods.base import Method, Option
from methods.relabel import WRONG_LABELS, draw_labels
from util.evaluation.evaluate import embed_images
from util.runtime.hardware import Hardware

KD_LOGITS = Option(
    "kd_logits", "label-free", "logits that KL compares", published="training", choices=("label-free", "training")
)


class Teacher:
    """Outputs of a model θ₀ on the training images at `indices`.

    θ₀ is in evaluation mode and the images are not augmented, so its outputs are constants of the task: computed here,
    once, and looked up by the images' positions in the training set, (B,).
    """

    def __init__(self, model: Recognizer, train_set: ImageSet, indices: Tensor, hardware: Hardware) -> None:
        # Tensors made in inference mode cannot take part in a loss: hence the copies.
        self._embeddings = embed_images(model, train_set, hardware, indices).clone()
        with torch.no_grad():
            self._logits = model.head(self._embeddings)
        # Position in the training set → row of the outputs.
        rows = torch.full((len(train_set),), -1)
        rows[indices.cpu()] = torch.arange(len(indices))
        self.rows = rows.to(hardware.device)

    def embeddings(self, indices: Tensor) -> Tensor:
        return self._embeddings[self.rows[indices]]

    def logits(self, indices: Tensor) -> Tensor:
        return self._logits[self.rows[indices]]


class Distillation(Method):
    """A method with a teacher θ₀: the model that enters the task or, as published, the pre-trained one in all tasks."""

    options = (Option("teacher", "task", "model entering the task or run", published="run", choices=("task", "run")),)

    taught: ClassVar[Sequence[str]] = ("remain",)  # the streams that need θ₀'s outputs
    pretrained: Recognizer | None = None

    def begin_run(self, model, tasks, train_set):
        if self.args.teacher == "run":
            self.pretrained = copy.deepcopy(model)

    def teacher_of(self, model: Recognizer) -> Recognizer:
        """θ₀, where `model` is the one that enters the task."""
        return model if self.pretrained is None else self.pretrained

    def prepare(self, model):
        indices = torch.cat([getattr(self.task, f"{stream}_indices") for stream in self.taught])
        self.teacher = Teacher(self.teacher_of(model), self.train_set, indices, self.hardware)


class RelabelAndMatch(Distillation):
    """What LwF, DER and FDR share: D_f is relabelled, and a teacher's outputs on D_r are matched."""

    options = (*Distillation.options, WRONG_LABELS, Option("epoch_over", "longest", published="forget"))

    def forget_loss(self, model: Recognizer, logits: Tensor, labels: Tensor) -> Tensor:
        """CE(z_f, ỹ), from label-free logits (B, classes) and the true labels (B,)."""
        return model.head.loss_of_logits(logits, draw_labels(self, labels))


def kl_divergences(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """KL_T(p‖q) = T² · KL(softmax(p/T) ‖ softmax(q/T)) of each image, (B,), from logits (B, classes) each.

    T² keeps the gradient's size independent of the temperature (arXiv 1503.02531, section 2).
    """
    p, q = (F.log_softmax(logits.float() / temperature, dim=1) for logits in (teacher, student))
    return temperature**2 * F.kl_div(q, p, reduction="none", log_target=True).sum(dim=1)


def kl_divergence(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """KL_T(p‖q) averaged over the batch."""
    return kl_divergences(teacher, student, temperature).mean()
