"""LIRF: learning with recoverable forgetting (Ye et al., ECCV 2022, arXiv 2207.08224)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone.blocks import Halves, as_tokens
from backbone.recognizer import Recognizer
from methods.base import Option, TaskOutput
from methods.distillation import KD_LOGITS, Distillation, kl_divergence
from methods.relabel import WRONG_LABELS, draw_labels
from util.evaluation.evaluate import map_images
from util.runtime.distributed import sharded


class LIRF(Distillation):
    """L = (1−κ) · CE(z_f, ỹ) + κ · w_kd · KL_T(h_f^teacher ‖ h_f) on the remaining classes' logits
          − w_at · AT(m_f, m_f^teacher) + w_re · CE(z_r, y_r)
          + w_dep · [κ · KL_T(h_f^teacher ‖ h_f^deposit) on the forgotten classes' logits + (1−κ) · CE(z_f^deposit, y_f)]

    Student and deposit are two lower halves of the network; the upper half is the teacher's, frozen, without dropout, and
    shared. m are the tokens between the halves, AT the mean squared difference of their attention maps (arXiv 1612.03928):
    squared activations averaged over the channels, scaled to unit length. h are label-free logits. The deposit is saved:
    with it in the student's place the forgotten classes are known again.

    Published, the distilled logits have the margin at ỹ on both sides, the deposit is never trained, and the maps are
    averaged over the tokens, their entries below 0.005 set to zero.
    """

    name = "lirf"
    title = "LIRF"
    taught = ("forget",)
    halves: Halves | None = None
    options = [
        *Distillation.options,
        WRONG_LABELS,
        Option("epoch_over", "longest", published="forget"),
        Option("lr", 1e-3, published=1e-4),
        Option("temperature", 10.0, "temperature T of the distillations", low=0.01),
        Option("kd_share", 0.1, "share κ of the distillation, the rest being CE's", high=1),
        Option("attention_weight", 300.0, "weight w_at of the attention distance"),
        Option("kd_weight", 10.0, "weight w_kd of the student's distillation"),
        Option("deposit_weight", 0.05, "weight w_dep of the deposit's losses"),
        Option("replay_weight", 5.0, "weight w_re of the replay"),
        # Slices: the columns from, or up to, the number of forgotten classes, which in a shuffled order are others.
        Option("kd_columns", "classes", "logits to distil", published="slices", choices=("classes", "slices")),
        KD_LOGITS,
        Option("attention_map", "tokens", "axis of attention maps", published="channels", choices=("tokens", "channels")),
        Option("deposit", "trained", "whether the deposit is trained", published="frozen", choices=("trained", "frozen")),
    ]

    def check(self, model, tasks, train_set):
        self.halves = Halves(model.backbone, model.architecture.image_size)

    def prepare(self, model):
        super().prepare(model)
        if self.halves is None:
            self.check(model, [self.task], self.train_set)
        teacher = self.teacher_of(model)

        def maps_of(images: Tensor) -> Tensor:
            return self._maps_and_embeddings(teacher, teacher.backbone, images)[0]

        self.teacher_maps = map_images(teacher, maps_of, self.train_set, self.hardware, self.task.forget_indices).clone()
        columns, count = range(len(self.train_set.classes)), len(self.task.forget)
        by_class = self.args.kd_columns == "classes"
        forgotten, remaining = (self.task.forget, self.task.remain) if by_class else (columns[:count], columns[count:])
        self.forgotten, self.remaining = (torch.tensor(c, device=self.hardware.device) for c in (forgotten, remaining))
        model.requires_grad_(False)
        # Part of the model while the task runs: optimized, moved to the device and saved for --resume with it.
        model.deposit = self.halves.lower_half(teacher.backbone).requires_grad_(self.args.deposit == "trained")
        for name, _ in model.deposit.named_parameters():
            model.backbone.get_parameter(name).requires_grad_(True)

    def begin_epoch(self, model, epoch):
        self.halves.stop_dropout_above(model.backbone)

    def loss(self, model, batch):
        args = self.args
        maps, embeddings = self._maps_and_embeddings(model, model.backbone, batch.images)
        logits = batch.split(model.head(embeddings))
        labels, indices = batch.split(batch.labels), batch.split(batch.indices)["forget"]
        teacher = self.teacher.logits(indices)

        wrong = draw_labels(self, labels["forget"])
        forget = model.head.loss_of_logits(logits["forget"], wrong)
        both = teacher, logits["forget"]
        if args.kd_logits == "training":
            both = [model.head.add_margin(each, wrong) for each in both]
        kd = self._distillation(*both, self.remaining)
        attention = (batch.split(maps)["forget"] - self.teacher_maps[self.teacher.rows[indices]]).square().mean()
        replay = model.head.loss_of_logits(logits["remain"], labels["remain"])
        total = (1 - args.kd_share) * forget + args.kd_weight * args.kd_share * kd + args.replay_weight * replay
        total = total - args.attention_weight * attention
        parts = {"total": total, "forget": forget, "kd": kd, "attention": attention, "replay": replay}
        if args.deposit == "frozen":
            return parts

        _, kept = self._maps_and_embeddings(model, model.deposit, batch.split(batch.images)["forget"])
        kept_logits = model.head(kept)
        deposit = args.kd_share * self._distillation(teacher, kept_logits, self.forgotten)
        deposit = deposit + (1 - args.kd_share) * model.head.loss_of_logits(kept_logits, labels["forget"])
        return parts | {"total": total + args.deposit_weight * deposit, "deposit": deposit}

    def _maps_and_embeddings(self, model: Recognizer, lower: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) through `lower` and the model's upper half → attention maps (B, tokens or dim), embeddings."""

        def of(part: Tensor) -> tuple[Tensor, Tensor]:
            normalized = model.normalize(part)
            mid = self.halves.mid(lower, normalized)
            squares = as_tokens(model.backbone, mid).float().square()
            if self.args.attention_map == "tokens":
                maps = F.normalize(squares.mean(dim=2))  # arXiv 1612.03928, equation 2
            else:
                maps = F.threshold(F.normalize(squares.mean(dim=1)), 0.005, 0.0)
            return maps, self.halves.upper(model.backbone, normalized, mid)

        return sharded(of, images)

    def _distillation(self, teacher: Tensor, student: Tensor, columns: Tensor) -> Tensor:
        return kl_divergence(teacher[:, columns], student[:, columns], self.args.temperature)

    def end_task(self, model):
        deposit = {name: tensor.detach().cpu().clone() for name, tensor in model.deposit.state_dict().items()}
        del model.deposit
        return TaskOutput({"deposits": deposit})
