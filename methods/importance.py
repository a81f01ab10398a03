"""How much each parameter matters: gradients of single images, without a loop over single images."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from backbone.recognizer import Recognizer
from data.image_set import ImageSet
from util.runtime.distributed import alone, share_of, sum_over_processes
from util.runtime.hardware import Hardware, plain_attention

# Gradients of several images are held at once: as many as fit in this many bytes.
GRADIENT_BYTES = 1 << 29

Importance = dict[str, Tensor]
Objective = Callable[[Tensor, Tensor], Tensor]  # label-free logits (B, classes), labels (B,) → scalar


def image_importance(
    model: Recognizer,
    objective: Objective,
    measure: Callable[[Tensor], Tensor],
    image_set: ImageSet,
    indices: Tensor,
    hardware: Hardware,
) -> Importance:
    """The mean over **single images** of measure(∂ objective / ∂θ_i), for every trained parameter, by name.

    `measure` is elementwise (square, abs). The model is in evaluation mode; images go through in chunks, `torch.func`
    vectorising the gradients of a chunk.
    """
    trained = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}

    def of_one(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return objective(functional_call(model, parameters, (image[None],)), label[None])

    gradients = vmap(grad(of_one), in_dims=(None, 0, 0), randomness="error")
    chunk = max(1, GRADIENT_BYTES // sum(4 * parameter.numel() for parameter in trained.values()))

    def of_chunk(images: Tensor, labels: Tensor) -> Importance:
        return {name: measure(g).sum(dim=0) for name, g in gradients(trained, images, labels).items()}

    # Fused attention has no batching rule: vmap would call it image by image.
    with plain_attention(model):
        return _mean(model, of_chunk, image_set, indices, hardware, chunk, len(indices))


def batch_importance(
    model: Recognizer,
    objective: Objective,
    measure: Callable[[Tensor], Tensor],
    image_set: ImageSet,
    indices: Tensor,
    hardware: Hardware,
    batch_size: int,
) -> Importance:
    """The published code's approximation: the mean over **batches** of measure(gradient of the batch's mean)."""
    names, trained = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)

    def of_batch(images: Tensor, labels: Tensor) -> Importance:
        gradients = torch.autograd.grad(objective(model(images), labels), trained)
        return {name: measure(g) for name, g in zip(names, gradients, strict=True)}

    return _mean(model, of_batch, image_set, indices, hardware, batch_size, -(-len(indices) // batch_size))


def _mean(
    model: Recognizer,
    of_chunk: Callable[[Tensor, Tensor], Importance],
    image_set: ImageSet,
    indices: Tensor,
    hardware: Hardware,
    chunk: int,
    count: int,
) -> Importance:
    was_training = model.training
    model.eval()
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters() if p.requires_grad}
    for positions in share_of(indices.to(image_set.images.device).split(chunk)):
        images, labels = image_set.images[positions].to(hardware.device), image_set.labels[positions].to(hardware.device)
        with alone(), hardware.autocast(), hardware.eager():
            part = of_chunk(images, labels)
        for name, value in part.items():
            total[name] += value.detach()
    model.train(was_training)
    return {name: value / count for name, value in sum_over_processes(total).items()}
