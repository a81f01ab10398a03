"""GS-LoRA: group-sparse low-rank adaptation (Zhao et al., CVPR 2024, arXiv 2403.11530)."""

import argparse
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import relu

from backbone import lora
from backbone.recognizer import Recognizer
from data.batches import Batch
from data.image_set import ImageSet
from data.tasks import ForgettingTask
from methods.base import Method, per_task, refuse_negative
from util.evaluation.evaluate import predict
from util.runtime.errors import UsageError


class GSLoRA(Method):
    """L = CE(z_r, y_r) + β · ReLU(BND − CE(z_f, y_f)) + α · Σ_g ‖θ_g‖₂

    z are the training logits (with margin), f and r the forgotten and the remaining images, θ_g the adapter parameters
    of group g. Only the adapters are trained; after the task they are merged into the weights.
    """

    name = "gs_lora"
    title = "GS-LoRA"
    defaults = {"lr": 2e-2}
    published = {
        "lr": 1e-2,
        "rank": 8,
        "alpha": 1e-4,
        "sparsity_warmup_epochs": 0,
        "bound": 105.0,
        "beta": [0.2, 0.25, 0.25, 0.2],
    }

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        group = parser.add_argument_group("GS-LoRA (arXiv 2403.11530)")
        group.add_argument("--rank", type=int, default=8, help="rank r of the adapters (paper: 8)")
        group.add_argument(
            "--lora-place", choices=lora.PLACES, default="ffn", help="layers that get adapters (paper: ffn)"
        )
        group.add_argument(
            "--grouping", choices=lora.GROUPINGS, default="block", help="what the penalty selects or drops (paper: block)"
        )
        group.add_argument("--alpha", type=float, default=1e-4, help="weight α of the group-sparse penalty")
        group.add_argument(
            "--sparsity-warmup-epochs",
            type=int,
            default=2,
            metavar="N",
            help="epochs with α = 0 at the start of each task (paper: 20 of 100 for a single task, 0 for a sequence)",
        )
        group.add_argument(
            "--beta",
            type=float,
            nargs="+",
            default=[0.2],
            metavar="β",
            help="weight β of the forgetting loss: one for all tasks, or one per task, the last one for any further "
            "(published: 0.2 0.25 0.25 0.2)",
        )
        group.add_argument(
            "--bound",
            type=float,
            default=120.0,
            metavar="BND",
            help="cross entropy past which forgetting is enough (published: 105)",
        )
        group.add_argument(
            "--negligible",
            type=float,
            default=1e-2,
            metavar="SHARE",
            help="at the task's end a group is set to zero if its update is below this share of the weights' norm and "
            "dropping it changes no prediction on the task's training images",
        )

    @classmethod
    def check_arguments(cls, args: argparse.Namespace) -> None:
        if args.rank < 1:
            raise UsageError(f"--rank {args.rank} is out of range: at least 1")
        refuse_negative(args, "alpha", "beta", "negligible", "sparsity_warmup_epochs")

    @classmethod
    def check_model(cls, args: argparse.Namespace, model: Recognizer) -> None:
        lora.layers_to_adapt(model.backbone, args.rank, args.lora_place)

    def begin_task(self, model: Recognizer, task: ForgettingTask, train_set: ImageSet) -> None:
        super().begin_task(model, task, train_set)
        lora.add_adapters(model.backbone, self.args.rank, self.args.lora_place)
        self.groups = lora.adapter_groups(model.backbone, self.args.grouping)
        self.beta = per_task(self.args.beta, task)
        self.alpha = self.args.alpha

    def begin_epoch(self, model: Recognizer, epoch: int) -> None:
        self.alpha = self.args.alpha if epoch >= self.args.sparsity_warmup_epochs else 0.0

    def loss(self, model: Recognizer, batch: Batch) -> dict[str, Tensor]:
        return self.terms(model, batch.split(model.embed(batch.images)), batch.split(batch.labels))

    def terms(self, model: Recognizer, embeddings: dict[str, Tensor], labels: dict[str, Tensor]) -> dict[str, Tensor]:
        """The parts of the loss, from the embeddings and labels of the streams "forget" and "remain"."""
        remain = model.head.loss(embeddings["remain"], labels["remain"])
        forget = relu(self.args.bound - model.head.loss(embeddings["forget"], labels["forget"]))
        sparsity = lora.group_norms(self.groups).sum()
        total = remain + self.beta * forget + self.alpha * sparsity
        return {"total": total, "remain": remain, "forget": forget, "sparsity": sparsity}

    def end_epoch(self, model: Recognizer, epoch: int) -> dict[str, float]:
        return {f"group_norm/{name}": norm for name, norm in self._norms().items()}

    def end_task(self, model: Recognizer) -> dict[str, Any]:
        zero = self._drop_negligible_groups(model)
        norms = {name: 0.0 if name in zero else norm for name, norm in self._norms().items()}
        tensors = lora.adapter_tensors(model.backbone)
        lora.merge_adapters(model.backbone)
        return {"adapters": tensors, "groups": {"norms": norms, "zero_ratio": len(zero) / len(self.groups)}}

    @torch.no_grad()
    def _norms(self) -> dict[str, float]:
        return dict(zip(self.groups, lora.group_norms(self.groups).tolist(), strict=True))

    @torch.no_grad()
    def _drop_negligible_groups(self, model: Recognizer) -> set[str]:
        """Set groups to exactly zero, smallest update first, as long as no training prediction changes.

        Returns the names of the groups whose update is zero.
        """
        seen = torch.cat([self.task.forget_indices, self.task.remain_indices])
        reference = predict(model, self.train_set, self.hardware, seen).predicted
        sizes = lora.relative_updates(model.backbone, self.args.grouping)
        zero = set()
        for name in sorted(sizes, key=sizes.get):
            if sizes[name] > self.args.negligible:
                break
            kept = [parameter.clone() for parameter in self.groups[name]]
            for parameter in self.groups[name]:
                parameter.zero_()
            if not torch.equal(predict(model, self.train_set, self.hardware, seen).predicted, reference):
                for parameter, value in zip(self.groups[name], kept, strict=True):
                    parameter.copy_(value)
                break
            zero.add(name)
        return zero
