"""GS-LoRA: group-sparse low-rank adaptation (Zhao et al., CVPR 2024, arXiv 2403.11530)."""

import torch
from torch import Tensor
from torch.nn.functional import relu

from backbone import lora
from backbone.recognizer import Recognizer
from methods.base import Method, Option, TaskOutput, per_task
from util.evaluation.evaluate import predict


class GSLoRA(Method):
    """L = CE(z_r, y_r) + β · ReLU(BND − CE(z_f, y_f)) + α · Σ_g ‖θ_g‖₂

    z are the training logits (with margin), f and r the forgotten and the remaining images, θ_g the adapter parameters
    of group g. Only the adapters are trained; after the task they are merged into the weights.
    """

    name = "gs_lora"
    title = "GS-LoRA"
    options = [
        Option("lr", 2e-2, published=1e-2),
        Option("batch_size", 48, few_shot=4),
        Option("epoch_over", "longest", published="remain"),
        Option("rank", 8, "rank r of the adapters", low=1),
        Option("lora_place", "auto", lora.PLACE_HELP),
        Option("grouping", "block", "groups of weights that the penalty selects or drops", choices=lora.GROUPINGS),
        Option("later_slope", 5.0, "a² of the initialization of A in tasks after the first", published=50.0),
        Option("alpha", 1e-4, "weight α of the group-sparse penalty"),
        Option("sparsity_warmup_epochs", 2, "epochs with α = 0 at a task's start (paper, single task: 20)", published=0),
        Option(
            "beta",
            [0.2],
            "weight β of forgetting, for all tasks or one each",
            published=[0.2, 0.25, 0.25, 0.2],
            few_shot=[0.3, 0.4, 0.28, 0.2],
        ),
        Option("bound", 60.0, "BND, the cross entropy beyond which forgetting is enough", published=105.0),
        # Dropped: set to zero at the task's end, unless that changes a prediction on the task's training images.
        Option("negligible", 1e-2, "share of a group's weight norm below which its update is dropped", published=0.0),
    ]

    def check(self, model, tasks, train_set):
        lora.layers_to_adapt(model.backbone, self.args.rank, self.args.lora_place)

    def prepare(self, model):
        slope = 5.0 if self.task.number == 1 else self.args.later_slope
        lora.add_adapters(model.backbone, self.args.rank, self.args.lora_place, slope)
        self.groups = lora.adapter_groups(model.backbone, self.args.grouping)
        self.alpha, self.beta = self.args.alpha, per_task(self.args.beta, self.task)

    def begin_epoch(self, model, epoch):
        self.alpha = self.args.alpha if epoch >= self.args.sparsity_warmup_epochs else 0.0

    def loss(self, model, batch):
        return self.terms(model, batch.split(model.embed(batch.images)), batch.split(batch.labels))

    def terms(self, model: Recognizer, embeddings: dict[str, Tensor], labels: dict[str, Tensor]) -> dict[str, Tensor]:
        """The parts of the loss, from the embeddings and labels of the streams "forget" and "remain"."""
        remain = model.head.loss(embeddings["remain"], labels["remain"])
        forget = relu(self.args.bound - model.head.loss(embeddings["forget"], labels["forget"]))
        sparsity = lora.group_norms(self.groups).sum()
        total = remain + self.beta * forget + self.alpha * sparsity
        return {"total": total, "remain": remain, "forget": forget, "sparsity": sparsity}

    def end_epoch(self, model, epoch):
        return {f"group_norm/{name}": norm for name, norm in self._norms().items()}

    def end_task(self, model):
        zero = self._drop_negligible_groups(model)
        norms = {name: 0.0 if name in zero else norm for name, norm in self._norms().items()}
        tensors = lora.merge_adapters(model.backbone)
        return TaskOutput({"adapters": tensors}, {"norms": norms, "zero_ratio": len(zero) / len(self.groups)})

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
