"""Spotter: masked distillation around the forgotten faces, and dispersion of them (Ha et al., arXiv 2506.01318)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from backbone.recognizer import Recognizer
from data.image_set import ImageSet
from methods.base import Option
from methods.delete import DELETE, MASKED_LOGIT
from methods.distillation import Teacher, kl_divergence
from util.runtime.distributed import single_process

STEP, STEPS = 0.01, 3  # of the perturbation, as published


class Spotter(DELETE):
    """L = λ · KL(masked teacher ‖ h_f) + (1 − λ) · KL(masked teacher ‖ h_p) + μ · mean cos(e_f, e_f′), over D_f alone

    The teacher's softmax is masked at all classes forgotten now. p are forgotten images perturbed by up to ε towards θ₀'s
    next best class, once a task; f, f′ are pairs of one identity in a batch, which are to lie apart.
    """

    name = "spotter"
    title = "Spotter"
    options = [
        *DELETE.options,
        Option("lambda", 0.7, "weight λ of the unperturbed images", high=1),
        Option("dispersion", 1.0, "weight μ of the dispersion"),
        Option("epsilon", 0.03, "largest perturbation of a pixel (0 to 1)", high=1),
    ]

    def prepare(self, model):
        super().prepare(model)
        teacher = self.teacher_of(model).eval()  # training begins with train()
        indices = self.task.forget_indices.to(self.train_set.images.device)
        images, labels = (part[indices].to(self.hardware.device) for part in (self.train_set.images, self.train_set.labels))
        # With gradients, as many at once as in a step. Eager: a compiled step would be compiled anew for these.
        chunks = zip(images.split(self.args.batch_size), labels.split(self.args.batch_size), strict=True)
        with single_process(), self.hardware.autocast(), self.hardware.eager():  # every process perturbs all images
            self.near = torch.cat([self._perturbed(teacher, *chunk) for chunk in chunks])
        near_set = ImageSet("near", self.near, labels, self.train_set.classes)
        self.near_teacher = Teacher(teacher, near_set, torch.arange(len(near_set)), self.hardware)
        self.forgotten = torch.tensor(self.task.forget, device=self.hardware.device)

    def _perturbed(self, teacher: Recognizer, images: Tensor, labels: Tensor) -> Tensor:
        """Projected sign-gradient steps on uint8 images (B, 3, H, W), within ε of them; returned as uint8."""
        original, limit = images.float(), 255 * self.args.epsilon
        with torch.no_grad():
            logits = teacher(images)
            target = logits.scatter(1, labels[:, None], MASKED_LOGIT).argmax(dim=1)
        moved = (original + limit * (2 * torch.rand_like(original) - 1)).clamp(0, 255)
        for _ in range(STEPS):
            moved.requires_grad_(True)
            (gradient,) = torch.autograd.grad(F.cross_entropy(teacher(moved), target), moved)
            moved = moved.detach() - 255 * STEP * gradient.sign()
            moved = torch.minimum(torch.maximum(moved, original - limit), original + limit).clamp(0, 255)
        return moved.round().to(torch.uint8)

    def loss(self, model, batch):
        rows, count = self.teacher.rows[batch.indices], len(batch)
        embeddings = model.embed(torch.cat([batch.images, self.near[rows]]))
        logits = model.head(embeddings)
        as_is = kl_divergence(self._masked(self.teacher.logits(batch.indices)), logits[:count])
        near = kl_divergence(self._masked(self.near_teacher.logits(rows)), logits[count:])
        unit = F.normalize(embeddings[:count].float())
        pairs = (batch.labels[:, None] == batch.labels).float().fill_diagonal_(0)
        together = (pairs * (unit @ unit.T)).sum() / pairs.sum().clamp(min=1)
        total = self.args.lambda_ * as_is + (1 - self.args.lambda_) * near + self.args.dispersion * together
        return {"total": total, "forget": as_is, "near": near, "together": together}

    def _masked(self, logits: Tensor) -> Tensor:
        return logits.index_fill(1, self.forgotten, MASKED_LOGIT)
