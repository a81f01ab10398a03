"""Unseen: an adapter after which a forgotten face lies where a model that never saw the person might have placed it."""

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from backbone import lora
from backbone.halves import half_depth
from backbone.recognizer import Recognizer
from data.batches import Batch, Pass
from data.image_set import ImageSet
from data.tasks import ForgettingTask
from methods.base import Method, Option, TaskOutput
from util.evaluation.evaluate import embed_images, map_images

GRID = 3  # patch tokens are averaged over 3×3 fields of the image
PENALTIES = np.logspace(-1, 5, 13)  # of the ridge regression, which chooses
AT_MOST = 10_000  # kept images in the regression
TEMPERATURE = 0.1


class Unseen(Method):
    """L = λ_f · (1 − cos(e_f, t)) + λ_r · (1 − cos(e_r, θ₀(x_r))) + λ · CE(z_r, y_r)

    t = unit[w · n + (1 − w) · (s · unit(P u) + √(1 − s²) · unit(u − P u))],  u = unit(θ₀(x_f))
    n = unit[r + b · unit(softmax(r Kᵀ / τ) K)],  r = unit(ridge(φ(x_f)))

    φ is what the first quarter of the blocks makes of an image: too early to know the person. Ridge regression, fitted on
    the kept images alone, says from it where θ₀ would place the face; b draws the place to the kept images' old embeddings
    K nearby, as training does. The rest of t is the old embedding u. P projects onto the forgotten identities' mean
    embeddings: s is what is left of what tells them apart. t is a constant of the task. Only the adapters are trained. The
    rows of the forgotten are zero afterwards: no template stays.
    """

    name = "unseen"
    title = "Unseen"
    options = [
        Option("lr", 2e-2),
        Option("rank", 8, "rank r of the adapters", low=1),
        Option("lora_place", "ffn", "layers that get adapters", choices=tuple(lora.PLACES)),
        Option("passes", 2, "passes over the longer of D_f and D_r that an epoch makes", low=1),
        Option("pull", 0.4, "b: how far the kept images nearby draw a target"),
        Option("likeness", 0.7, "w: share of that place in a target; the rest is the old embedding", high=1),
        Option("person", 0.4, "s: share of what tells the forgotten apart that is left of the old embedding", high=1),
        Option("lambda_forget", 5.0, "weight λ_f of the forgotten images' targets"),
        Option("lambda_remain", 1.0, "weight λ_r of the remaining images' old embeddings"),
        Option("lambda", 0.1, "weight λ of the remaining images' cross entropy"),
    ]

    def check_model(self, model: Recognizer) -> None:
        lora.layers_to_adapt(model.backbone, self.args.rank, self.args.lora_place)
        half_depth(model.backbone)

    def begin_task(self, model: Recognizer, task: ForgettingTask, train_set: ImageSet, epochs: int) -> None:
        super().begin_task(model, task, train_set, epochs)
        seen = torch.cat([task.forget_indices, task.remain_indices])
        unit = F.normalize(embed_images(model, train_set, self.hardware, seen).clone())
        forgotten, kept = unit.split([len(task.forget_indices), len(task.remain_indices)])
        labels = train_set.labels[task.forget_indices.to(train_set.labels.device)].to(unit.device)
        likeness, place = self.args.likeness, self._place(model, seen, kept)
        target = likeness * place + (1 - likeness) * self._without_person(forgotten, labels)
        targets = torch.cat([F.normalize(target), kept])
        self.targets = unit.new_zeros(len(train_set), unit.shape[1]).index_copy(0, seen.to(unit.device), targets)
        lora.add_adapters(model.backbone, self.args.rank, self.args.lora_place)

    def _place(self, model: Recognizer, seen: Tensor, kept: Tensor) -> Tensor:
        """n (N, dim) of the images `seen` before the kept ones, whose old embeddings are `kept` (M, dim), of unit length."""
        depth = max(1, len(model.backbone.blocks) // 4)

        def of(images: Tensor) -> Tensor:
            (tokens,) = model.backbone.forward_intermediates(
                model.normalize(images), [depth - 1], stop_early=True, output_fmt="NCHW", intermediates_only=True
            )
            return F.adaptive_avg_pool2d(tokens.float(), GRID).flatten(1)

        features = map_images(model, of, self.train_set, self.hardware, seen).cpu().numpy()
        forgotten, early = np.split(features, [len(seen) - len(kept)])
        step = -(-len(kept) // AT_MOST)
        ridge = make_pipeline(StandardScaler(), RidgeCV(PENALTIES)).fit(early[::step], kept[::step].cpu().numpy())
        found = F.normalize(torch.from_numpy(ridge.predict(forgotten)).to(kept))
        near = (found @ kept.T / TEMPERATURE).softmax(dim=1) @ kept
        return F.normalize(found + self.args.pull * F.normalize(near))

    def _without_person(self, unit: Tensor, labels: Tensor) -> Tensor:
        """The old embeddings (N, dim) of the forgotten, of unit length, with only s of what tells these apart."""
        means = torch.stack([unit[labels == c].mean(dim=0) for c in labels.unique()])
        basis = torch.linalg.svd(means, full_matrices=False).Vh
        person = unit @ basis.T @ basis
        share = self.args.person
        return share * F.normalize(person) + (1 - share**2) ** 0.5 * F.normalize(unit - person)

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
