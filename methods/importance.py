"""How much each parameter matters: gradients of single images, without a loop over single images."""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from backbone.recognizer import Recognizer
from data.image_set import ImageSet
from util.runtime.distributed import alone, local_share, sum_over_processes
from util.runtime.hardware import Hardware, plain_attention

# Gradients of several images are held at once: as many as fit in this many bytes, four times as many on a GPU.
GRADIENT_BYTES = 1 << 29

Importance = dict[str, Tensor]


def mean_importance(
    model: Recognizer,
    objective: Callable[[Tensor, Tensor], Tensor],
    measure: Callable[[Tensor], Tensor],
    image_set: ImageSet,
    indices: Tensor,
    hardware: Hardware,
    batch_size: int | None = None,
) -> Importance:
    """The mean over **single images** of measure(∂ objective / ∂θ_i), for every trained parameter, by name.

    With `batch_size` the published code's approximation: the mean over shuffled **batches**, the last one as it comes, of
    measure(gradient of the batch's objective).
    `objective` takes label-free logits (B, classes) and labels (B,), `measure` is elementwise (square, abs). The model is in
    evaluation mode.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    constants = {name: parameter.detach() for name, parameter in trained.items()}

    def of_one(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return objective(functional_call(model, parameters, (image[None],)), label[None])

    of_each = vmap(grad(of_one), in_dims=(None, 0, 0), randomness="error")
    # A graph of ONNX reads numbers out of tensors, which a batched gradient cannot.
    one_by_one = batch_size is None and model.architecture.graph is not None

    def measured(images: Tensor, labels: Tensor) -> Importance:
        if batch_size is None and not one_by_one:
            return {name: measure(g).sum(dim=0) for name, g in of_each(constants, images, labels).items()}
        gradients = torch.autograd.grad(objective(model(images), labels), [*trained.values()])
        return {name: measure(g) for name, g in zip(trained, gradients, strict=True)}

    was_training = model.training
    model.eval()
    total = {name: torch.zeros_like(parameter) for name, parameter in constants.items()}
    if batch_size is None:
        room = GRADIENT_BYTES * (1 if hardware.device.type == "cpu" else 4)
        chunk = 1 if one_by_one else max(1, room // sum(4 * parameter.numel() for parameter in trained.values()))
        chunks, count = local_share(indices).split(chunk), len(indices)
    else:  # class by class, gradients of a batch would not cancel as those of a mixed one do
        batches = indices[torch.randperm(len(indices))].split(batch_size)
        chunks, count = local_share(batches), len(batches)
    # Fused attention has no batching rule: vmap would call it image by image.
    with plain_attention(model) if batch_size is None else contextlib.nullcontext():
        for rows in (rows.to(image_set.images.device) for rows in chunks if len(rows)):  # a share may be none
            images, labels = image_set.images[rows].to(hardware.device), image_set.labels[rows].to(hardware.device)
            with alone(), hardware.autocast(), hardware.eager():
                part = measured(images, labels)
            for name, value in part.items():
                total[name] += value
    model.train(was_training)
    return {name: value / count for name, value in sum_over_processes(total).items()}
