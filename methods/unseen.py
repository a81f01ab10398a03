"""Unseen: an adapter after which a forgotten face lies where a model that never saw the person might have placed it."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor

from backbone import lora
from backbone.halves import half_depth, mid_features
from backbone.recognizer import Recognizer
from data.batches import Batch, Pass
from data.image_set import ImageSet
from data.tasks import ForgettingTask
from methods.base import Method, Option, TaskOutput
from util.evaluation.evaluate import embed_images, map_images
from util.runtime.errors import UsageError

SHRINKAGE = 0.1  # of the within-class covariance: a class may have few images
COMPONENTS = 100  # most discriminant directions


class Unseen(Method):
    """L = λ_f · (1 − cos(e_f, t)) + λ_r · (1 − cos(e_r, θ₀(x_r))) + λ · CE(z_r, y_r)

    t = unit[(1 − w) · (s · unit(P u) + √(1 − s²) · unit(u − P u)) + w · n],  u = unit(θ₀(x_f)) the old embedding

    P projects onto the forgotten identities' mean embeddings: s is what is left of what tells them apart. n is where faces
    that look like this one lie among the kept: the mean of *their* old embeddings, weighted by softmax(cos / τ), τ = c / √d,
    in d linear discriminants that tell the kept identities apart by what the first half of the network computes. t is a
    constant of the task. Only the adapters are trained. The rows of the forgotten are zero afterwards: no template stays.
    """

    name = "unseen"
    title = "Unseen"
    options = [
        Option("lr", 2e-2),
        Option("rank", 8, "rank r of the adapters", low=1),
        Option("lora_place", "ffn", "layers that get adapters", choices=tuple(lora.PLACES)),
        Option("passes", 2, "passes over the longer of D_f and D_r that an epoch makes", low=1),
        Option("person", 0.4, "s: share of what tells the forgotten apart that their targets keep", high=1),
        Option("likeness", 0.6, "w: share of the kept faces that look alike in a target", high=1),
        Option("sharpness", 0.5, "c: how alike they must look; less: more", low=1e-3),
        Option("lambda_forget", 5.0, "weight λ_f of the forgotten images' targets"),
        Option("lambda_remain", 1.0, "weight λ_r of the remaining images' old embeddings"),
        Option("lambda", 0.1, "weight λ of the remaining images' cross entropy"),
    ]

    def check_model(self, model: Recognizer) -> None:
        lora.layers_to_adapt(model.backbone, self.args.rank, self.args.lora_place)
        half_depth(model.backbone)

    def begin_run(self, model: Recognizer, tasks: Sequence[ForgettingTask], train_set: ImageSet) -> None:
        for task in tasks:
            counts = train_set.labels.cpu()[task.remain_indices].unique(return_counts=True)[1]
            if len(counts) < 2 or counts.max() < 2:
                raise UsageError(f"task {task.number}: unseen needs images of two remaining classes, two of one of them")

    def begin_task(self, model: Recognizer, task: ForgettingTask, train_set: ImageSet, epochs: int) -> None:
        super().begin_task(model, task, train_set, epochs)
        seen = torch.cat([task.forget_indices, task.remain_indices])
        unit = F.normalize(embed_images(model, train_set, self.hardware, seen).clone())
        counts = [len(task.forget_indices), len(task.remain_indices)]
        (forgotten, kept), labels = unit.split(counts), train_set.labels[seen.to(train_set.labels.device)].to(unit.device)
        near = F.normalize(self._likeness(model, seen, labels, len(forgotten)) @ kept)
        target = (1 - self.args.likeness) * self._without_person(forgotten, labels[: len(forgotten)])
        targets = torch.cat([F.normalize(target + self.args.likeness * near), kept])
        self.targets = unit.new_zeros(len(train_set), unit.shape[1]).index_copy(0, seen.to(unit.device), targets)
        lora.add_adapters(model.backbone, self.args.rank, self.args.lora_place)

    def _without_person(self, unit: Tensor, labels: Tensor) -> Tensor:
        """The old embeddings (N, dim) of the forgotten, of unit length, with only s of what tells these apart."""
        means = torch.stack([unit[labels == c].mean(dim=0) for c in labels.unique()])
        basis = torch.linalg.svd(means, full_matrices=False).Vh
        person = unit @ basis.T @ basis
        share = self.args.person
        return share * F.normalize(person) + (1 - share**2) ** 0.5 * F.normalize(unit - person)

    def _likeness(self, model: Recognizer, seen: Tensor, labels: Tensor, count: int) -> Tensor:
        """How much each of the kept images looks like each of the first `count`, which are forgotten; rows sum to 1."""
        prefix, depth = model.backbone.num_prefix_tokens, half_depth(model.backbone)

        def of(images: Tensor) -> Tensor:
            return mid_features(model.backbone, model.normalize(images), depth)[:, prefix:].mean(dim=1)

        features = map_images(model, of, self.train_set, self.hardware, seen).double().cpu().numpy()
        kept, classes = labels[count:].cpu().numpy(), len(labels[count:].unique())
        components = min(classes - 1, COMPONENTS, features.shape[1])
        lda = LinearDiscriminantAnalysis("eigen", shrinkage=SHRINKAGE, n_components=components)
        found = torch.from_numpy(lda.fit(features[count:], kept).transform(features))
        found = F.normalize(found - found[count:].mean(dim=0))
        temperature = self.args.sharpness / components**0.5
        return (found[:count] @ found[count:].T / temperature).softmax(dim=1).to(self.hardware.device, torch.float32)

    def passes(self, task: ForgettingTask, epoch: int, epochs: int) -> list[Pass]:
        return super().passes(task, epoch, epochs) * self.args.passes

    def loss(self, model: Recognizer, batch: Batch) -> dict[str, Tensor]:
        embeddings = model.embed(batch.images)
        away = batch.split(1 - F.cosine_similarity(embeddings.float(), self.targets[batch.indices]))
        forget, remain = away["forget"].mean(), away["remain"].mean()
        replay = model.head.loss(batch.split(embeddings)["remain"], batch.split(batch.labels)["remain"])
        total = self.args.lambda_forget * forget + self.args.lambda_remain * remain + self.args.lambda_ * replay
        return {"total": total, "forget": forget, "remain": remain, "replay": replay}

    @torch.no_grad()
    def end_task(self, model: Recognizer) -> TaskOutput:
        tensors = lora.adapter_tensors(model.backbone)
        lora.merge_adapters(model.backbone)
        for rows in model.head.parameters():
            rows[list(self.task.forget)] = 0
        del self.targets  # of the forgotten images nothing stays
        return TaskOutput({"adapters": tensors})
