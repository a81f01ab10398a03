"""The plain path, for `scripts/benchmark.py` to measure against: what a straightforward implementation does.

float32 and eager; attention written out as softmax(QKᵀ/√d)V; a forward pass for each stream; JPEG files decoded in
DataLoader workers in every epoch; the teacher run at every step; an optimizer that loops over the parameters; and the
loss read back at every step. The losses are written down here a second time, from the papers' formulas, so that the
check that both paths agree is a check.
"""

import argparse
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import hflip, pil_to_tensor

from backbone.lora import LoRALinear
from backbone.recognizer import Recognizer
from methods.relabel import wrong_labels

Stream = tuple[Tensor, Tensor]  # images float (B, 3, H, W) in [0, 1], labels (B,)


class JpegFiles(Dataset):
    """Files → (float image (3, H, W), label), decoded at every access."""

    def __init__(self, paths: list[str], labels: list[int], mirror: bool = False) -> None:
        self.paths, self.labels, self.mirror = paths, labels, mirror

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with Image.open(self.paths[index]) as image:
            pixels = pil_to_tensor(image.convert("RGB")).float() / 255
        if self.mirror and torch.rand(()) < 0.5:
            pixels = hflip(pixels)
        return pixels, self.labels[index]


def load(files: JpegFiles, batch_size: int, workers: int, train: bool = True) -> DataLoader:
    return DataLoader(
        files, batch_size, shuffle=train, drop_last=train, num_workers=workers, persistent_workers=workers > 0
    )


def endless(loader: DataLoader) -> Iterator[list[Tensor]]:
    while True:
        yield from loader


class PlainTraining:
    """A method's steps on `model`, which is fp32 and on its device with its trained parameters chosen."""

    def __init__(
        self,
        name: str,
        args: argparse.Namespace,
        model: Recognizer,
        loaders: Mapping[str, DataLoader],
        teacher: Recognizer | None = None,
        importance: Mapping[str, Tensor] | None = None,
        forgotten: Tensor | None = None,
    ) -> None:
        self.args, self.model, self.teacher = args, model, teacher
        self.importance, self.forgotten = importance, forgotten
        self.loss = {"gs_lora": self.gs_lora, "der_pp": self.der_pp, "ewc": self.ewc, "pretrain": self.pretrain}[name]
        self.loaders = loaders
        self.streams = {stream: endless(loader) for stream, loader in loaders.items()}
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.entered = {name: p.detach().clone() for name, p in self.trained.items()}
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=args.lr, weight_decay=0.05, foreach=False)
        self.device = model.head.weight.device

    def step(self) -> float:
        streams = {name: tuple(t.to(self.device) for t in next(stream)) for name, stream in self.streams.items()}
        loss = self.loss(streams)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def embed(self, model: Recognizer, images: Tensor) -> Tensor:
        return model.backbone(model.normalize(images * 255))

    def cosface(self, stream: Stream, labels: Tensor | None = None) -> Tensor:
        """Cross entropy of CosFace's training logits."""
        images, own = stream
        labels = own if labels is None else labels
        cos = F.linear(F.normalize(self.embed(self.model, images)), F.normalize(self.model.head.weight))
        return F.cross_entropy(64.0 * (cos - 0.35 * F.one_hot(labels, cos.shape[1])), labels)

    def logits(self, model: Recognizer, images: Tensor) -> Tensor:
        return 64.0 * F.linear(F.normalize(self.embed(model, images)), F.normalize(model.head.weight))

    def pretrain(self, streams: Mapping[str, Stream]) -> Tensor:
        return self.cosface(streams["train"])

    def gs_lora(self, streams: Mapping[str, Stream]) -> Tensor:
        remain = self.cosface(streams["remain"])
        forget = F.relu(self.args.bound - self.cosface(streams["forget"]))
        sparsity = 0.0
        for block in self.model.backbone.blocks:
            squares = 0.0
            for layer in block.modules():
                if isinstance(layer, LoRALinear):
                    squares = squares + (layer.lora_A**2).sum() + (layer.lora_B**2).sum()
            sparsity = sparsity + torch.sqrt(squares)
        return remain + self.args.beta[0] * forget + self.args.alpha * sparsity

    def der_pp(self, streams: Mapping[str, Stream]) -> Tensor:
        images, labels = streams["forget"]
        forget = self.cosface(streams["forget"], wrong_labels(labels, len(self.model.head.weight)))
        images, _ = streams["remain"]
        with torch.no_grad():
            teacher = self.logits(self.teacher, images)
        matched = ((self.logits(self.model, images) - teacher) ** 2).sum(dim=1).mean()
        replay = self.cosface(streams["replay"])
        return forget + self.args.lambda_ * matched + self.args.lambda_replay * replay

    def ewc(self, streams: Mapping[str, Stream]) -> Tensor:
        _, labels = streams["all"]
        wrong = wrong_labels(labels, len(self.model.head.weight))
        loss = self.cosface(streams["all"], torch.where(self.forgotten[labels], wrong, labels))
        for name, parameter in self.trained.items():
            loss = loss + self.args.lambda_ * (self.importance[name] * (parameter - self.entered[name]) ** 2).sum()
        return loss


@torch.no_grad()
def evaluate(model: Recognizer, loader: DataLoader) -> float:
    """Plain accuracy in %, counted batch by batch."""
    model.eval()
    device, correct, seen = model.head.weight.device, 0, 0
    for images, labels in loader:
        embeddings = model.backbone(model.normalize(images.to(device) * 255))
        cos = F.linear(F.normalize(embeddings), F.normalize(model.head.weight))
        correct += (cos.argmax(dim=1) == labels.to(device)).sum().item()
        seen += len(labels)
    model.train()
    return 100 * correct / seen
