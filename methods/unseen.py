"""Unseen: an adapter after which a forgotten face lies where a model that never saw the person might have placed it."""

import sys
import warnings
from bisect import bisect_left
from functools import cache
from math import ceil

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from backbone import lora
from backbone.blocks import as_map, block_names, block_outputs
from backbone.recognizer import Recognizer
from data import build_strangers
from data.image_set import ImageSet
from methods.base import Option, TaskOutput
from methods.replay import REPLAY, Replaying
from util.evaluation.evaluate import embed_images, map_images
from util.runtime.errors import RunError, UsageError
from util.storage.hashes import check_strangers

SHRINKAGE = 0.1  # of the within-class covariance: a class may have few images
COMPONENTS = 100  # most discriminant directions
PENALTY = 1 / 170  # of the ridge regression, per image that it is fitted on
SAMPLE, RUINED = 256, 0.5  # kept photos looked at after an epoch; their mean cosine to before in a ruined network
CHUNK = 256  # forgotten photos that are compared with all kept ones at once
NOTHING = 1e-5  # a length, of 1, that is rounding
CARRIED = 0.5  # of how much more alike trained photos of a person are than their targets, what carries over to new ones
SHARES = np.linspace(1, 0, 21)  # the first of equals: one photo of each person says nothing of s


class Unseen(Replaying):
    """L = λ_f · (1 − cos(e_f, t)) + λ_r · (1 − cos(e_r, θ₀(x_r))) + λ · CE(z_r, y_r)

    t = unit[(1 − w) · (s · v + √(1 − s²) · unit(u − P u)) + w · n],  u = unit(θ₀(x_f)) the old embedding

    v is where a stranger's eye puts the face: ridge regression from what the first quarter of the network computes, too
    early to know a person, to the mean embeddings of kept people. With --strangers it is read as deep as targets need to
    be as alike as photos of a stranger: a network that has learned from millions of people distinguishes strangers too.
    n is where kept faces lie that look like this one: the mean of *their* old embeddings, weighted by softmax(cos / τ),
    τ = c / √d, in d linear discriminants of the kept people from what the first half of the network computes. P projects
    onto the forgotten people's mean embeddings: u − P u is what the photo shows beside the person.

    s is found: two targets of a person are as alike, on average, as two photos of a stranger are: of --strangers, or by v.
    An adapter leaves a person's photos more alike than their targets; after each epoch s makes up for half of it, which is
    what carries over to new photos. Only the adapters are trained. Afterwards the rows of the forgotten are zero.
    """

    name = "unseen"
    title = "Unseen"
    options = [
        Option("lr", 2e-2),
        Option("rank", 8, "rank r of the adapters", low=1),
        Option("lora_place", "auto", lora.PLACE_HELP),
        Option("passes", 2, "passes over the longer of D_f and D_r that an epoch makes", low=1),
        Option("visits", 5, "fewest passes over D_f that an epoch makes", low=0),
        Option("likeness", 0.45, "share w of similar kept faces in a target", high=1),
        Option("sharpness", 0.5, "temperature c of that similarity; smaller values are stricter", low=1e-3),
        Option("lambda_forget", 5.0, "weight λ_f of the forgotten images' targets"),
        Option("lambda_remain", 1.0, "weight λ_r of the remaining images' old embeddings"),
        Option("lambda", 0.1, "weight λ of the remaining images' cross entropy; none with --replay"),
        Option("strangers", "", "folder <person>/<image> in no training set: targets become as alike as their photos"),
        REPLAY,
    ]

    strangers: ImageSet | None = None

    def check(self, model, tasks, train_set):
        lora.layers_to_adapt(model.backbone, self.args.rank, self.args.lora_place)
        if len(block_names(model.backbone)) < 2:
            raise UsageError(
                f"unseen reads early blocks, and {type(model.backbone).__name__} has none: take another --method"
            )
        super().check(model, tasks, train_set)
        labels = self.seen_set.labels.cpu()
        for task in tasks:
            counts = labels[self.seen(task).remain_indices].unique(return_counts=True)[1]
            if len(counts) < 2 or counts.max() < 2:
                message = f"task {task.number}: unseen needs images of two remaining classes, two of one of them"
                raise UsageError(f"{message}: raise --data-ratio or --few-shot, or give --replay")
        if self.args.strangers:
            about = model.architecture
            self.strangers = build_strangers(self.args, about.image_size, self.hardware.device, about.crop_pct)
            used = torch.cat([indices for task in tasks for indices in (task.forget_indices, task.remain_indices)])
            check_strangers(self.strangers, self.seen_set, used.unique())
            if self.strangers.labels.bincount().max() < 2:
                raise UsageError(f"--strangers {self.args.strangers}: nobody there has two photos")

    def prepare(self, model):
        seen = torch.cat([self.task.forget_indices, self.task.remain_indices])
        unit = F.normalize(embed_images(model, self.train_set, self.hardware, seen).clone())
        counts = [len(self.task.forget_indices), len(self.task.remain_indices)]
        (forgotten, kept), labels = unit.split(counts), self.train_set.labels[seen.to(self.train_set.labels.device)].cpu()
        self.people, kept_labels = labels.split(counts)
        blocks = block_names(model.backbone)
        middle = self._features(model, seen, blocks[len(blocks) // 2 - 1], 1)
        near = F.normalize(those_alike(middle, kept, kept_labels, self.args.sharpness))
        rest = without_person(forgotten, self.people)

        @cache
        def looked_up(block: str) -> Tensor:
            """v, read from this block."""
            return F.normalize(as_strangers(self._features(model, seen, block, 2), kept, kept_labels)).to(kept)

        def alike(block: str) -> float:
            """How alike the targets of a person are with v of this block alone."""
            self.parts = looked_up(block), rest, near
            return coherence(self._targets(1), self.people)

        depth = max(1, len(blocks) // 4) - 1
        if self.strangers is None:
            self.wanted = coherence(looked_up(blocks[depth]), self.people)
        else:
            strangers = F.normalize(embed_images(model, self.strangers, self.hardware))
            self.wanted = coherence(strangers, self.strangers.labels)
            self._warn_of_unknown(coherence(forgotten, self.people))
            depth = min(bisect_left(blocks, self.wanted, lo=depth, key=alike), len(blocks) - 1)
        self.parts = looked_up(blocks[depth]), rest, near
        self.targets = unit.new_zeros(len(self.train_set), unit.shape[1]).index_copy(0, seen.to(unit.device), unit)
        self._aim(excess=0.0)
        lora.add_adapters(model.backbone, self.args.rank, self.args.lora_place)

    def _warn_of_unknown(self, known: float) -> None:
        """Say so where photos are no more alike than strangers', `known` being how alike they are."""
        if known <= self.wanted:
            found = f"the photos that task {self.task.number} forgets are no more alike (mean cosine {known:.2f})"
            found += f" than strangers' ({self.wanted:.2f}): this network may never have learned these people"
            print(f"warning: {found}, and deleting their rows may be enough", file=sys.stderr)

    def _targets(self, share: float) -> Tensor:
        strangers, rest, near = self.parts
        seen_anew = share * strangers + (1 - share**2) ** 0.5 * rest
        return F.normalize((1 - self.args.likeness) * seen_anew + self.args.likeness * near)

    def _aim(self, excess: float) -> None:
        """Choose s, and set the targets, for an edit that leaves photos of a person more alike than these by `excess`."""
        wanted = self.wanted - excess
        self.excess = excess
        self.share = min(SHARES, key=lambda s: round(abs(coherence(self._targets(s), self.people) - wanted), 6))
        self.targets[self.task.forget_indices] = self._targets(self.share)

    def _features(self, model: Recognizer, seen: Tensor, block: str, size: int) -> np.ndarray:
        """What a block computes of each image, averaged over size × size parts of the face, (N, size² · width)."""

        def of(images: Tensor) -> Tensor:
            (output,) = block_outputs(model.backbone, model.normalize(images), [block])
            return F.adaptive_avg_pool2d(as_map(model.backbone, output).float(), size).flatten(1)

        return map_images(model, of, self.train_set, self.hardware, seen).double().cpu().numpy()

    def passes(self, task, epoch, epochs):
        forget, longer = len(task.forget_indices), max(map(len, (task.forget_indices, self.seen(task).remain_indices)))
        return super().passes(task, epoch, epochs) * max(self.args.passes, ceil(self.args.visits * forget / longer))

    def loss(self, model, batch):
        embeddings = model.embed(batch.images)
        away = batch.split(1 - F.cosine_similarity(embeddings.float(), self.targets[batch.indices]))
        losses = {"forget": away["forget"].mean(), "remain": away["remain"].mean()}
        total = self.args.lambda_forget * losses["forget"] + self.args.lambda_remain * losses["remain"]
        if self.replay is None:  # whose people have no rows
            losses["replay"] = model.head.loss(batch.split(embeddings)["remain"], batch.split(batch.labels)["remain"])
            total = total + self.args.lambda_ * losses["replay"]
        return {"total": total} | losses

    def end_epoch(self, model, epoch):
        kept = self.task.remain_indices[:: max(1, len(self.task.remain_indices) // SAMPLE)]
        now = F.cosine_similarity(embed_images(model, self.train_set, self.hardware, kept), self.targets[kept]).mean().item()
        if now < RUINED:
            message = f"task {self.task.number} has ruined the network (kept photos' mean cosine to before: {now:.2f})"
            raise RunError(f"{message}: lower --lr, now {self.args.lr:g}")
        indices = self.task.forget_indices
        reached = F.normalize(embed_images(model, self.train_set, self.hardware, indices))
        self._aim(CARRIED * (coherence(reached, self.people) - coherence(self.targets[indices], self.people)))
        return {"share": self.share}

    def end_task(self, model):
        tensors = lora.merge_adapters(model.backbone)
        model.head.delete_rows(self.task.forget)
        del self.targets, self.parts  # of the forgotten images nothing stays
        return TaskOutput({"adapters": tensors})

    def state_dict(self):
        return {"excess": self.excess} if hasattr(self, "parts") else {}

    def load_state_dict(self, state):
        if state:
            self._aim(state["excess"])


def without_person(unit: Tensor, labels: Tensor) -> Tensor:
    """What embeddings (N, dim) of unit length have beside the span of their people's means, of unit length.

    Beside their own person's mean alone, where the means span the whole space. Zero, where nothing is left: a person's only
    photo is its mean.
    """
    means = person_means(unit, labels)
    _, lengths, basis = torch.linalg.svd(means, full_matrices=False)
    basis = basis[lengths > NOTHING * lengths[0]]
    rest = unit - unit @ basis.T @ basis
    if len(basis) == unit.shape[1]:
        own = F.normalize(means)[labels.unique(return_inverse=True)[1]]
        rest = unit - (unit * own).sum(dim=1, keepdim=True) * own
    return F.normalize(rest) * (rest.norm(dim=1, keepdim=True) > NOTHING)


def person_means(embeddings: Tensor, labels: Tensor) -> Tensor:
    return torch.stack([embeddings[labels == c].mean(dim=0) for c in labels.unique()])


def those_alike(features: np.ndarray, kept: Tensor, labels: Tensor, sharpness: float) -> Tensor:
    """The mean embedding (N, dim) of the kept images that look like each of the others, weighted by how much they do; `kept`
    are the embeddings (M, dim) of the last images, of the people `labels`."""
    # scikit-learn takes two seconds to import: no run of another method waits for it.
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    components = min(len(labels.unique()) - 1, COMPONENTS, features.shape[1])
    lda = LinearDiscriminantAnalysis("eigen", shrinkage=SHRINKAGE, n_components=components)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a person's only photo has no spread
        found = torch.from_numpy(lda.fit(features[-len(kept) :], labels.numpy()).transform(features))
    found = F.normalize(found - found[-len(kept) :].mean(dim=0)).to(kept)
    forgotten, kept_found = found.split([len(found) - len(kept), len(kept)])
    # Forgotten × kept would not fit for a hundred thousand photos.
    alike = (part @ kept_found.T / (sharpness / components**0.5) for part in forgotten.split(CHUNK))
    return torch.cat([weights.softmax(dim=1) @ kept for weights in alike])


def as_strangers(features: np.ndarray, kept: Tensor, labels: Tensor) -> Tensor:
    """Where a regression to the people of the kept puts the other images, (N, dim), from the mean of these people; it is
    fitted on the kept, the last images, with their embeddings (M, dim) and `labels`."""
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    means = person_means(kept.double().cpu(), labels)
    own = (means - means.mean(dim=0))[labels.unique(return_inverse=True)[1]]
    regression = make_pipeline(StandardScaler(), Ridge(PENALTY * len(kept))).fit(features[-len(kept) :], own.numpy())
    return torch.from_numpy(regression.predict(features[: -len(kept)]))


def coherence(unit: Tensor, labels: Tensor) -> float:
    """The mean cosine of two photos of a person, over the people who have two, of (N, dim) of unit length."""
    counts = labels.unique(return_counts=True)[1].to(unit.device)
    lengths = person_means(unit, labels).square().sum(dim=1)  # with each photo's cosine to itself, 1
    several = counts > 1
    return ((counts * lengths - 1) / (counts - 1))[several].mean().item() if several.any() else 0.0
