"""How much each parameter matters: gradients of single images, without a loop over single images."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from backbone.recognizer import Recognizer
from data.image_set import ImageSet
from util.runtime.distributed import local_share, single_process, sum_over_processes
from util.runtime.hardware import Hardware, plain_attention

# Gradients of several images are held at once: as many as fit in this many bytes, four times as many on a GPU.
GRADIENT_BYTES = 1 << 29

Importance = dict[str, Tensor]
Objective = Callable[[Tensor, Tensor], Tensor]


def mean_importance(
    model: Recognizer,
    objective: Objective,
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
    trained = model.trained()
    # A graph of ONNX reads numbers out of tensors, which a batched gradient cannot.
    vectorized = batch_size is None and model.architecture.graph is None
    if batch_size is None:
        room = GRADIENT_BYTES * (1 if hardware.device.type == "cpu" else 4)
        at_once = max(1, room // sum(4 * parameter.numel() for parameter in trained.values())) if vectorized else 1
        chunks, count = local_share(indices).split(at_once), len(indices)
    else:  # class by class, gradients of a batch would not cancel as those of a mixed one do
        batches = indices[torch.randperm(len(indices))].split(batch_size)
        chunks, count = local_share(batches), len(batches)
    was_training = model.training
    model.eval()
    total = {name: torch.zeros_like(parameter) for name, parameter in trained.items()}
    # Of a single image, oneDNN's backward pass of a small bf16 convolution corrupts memory (torch 2.14, two threads).
    autocast = hardware.autocast if vectorized or batch_size else contextlib.nullcontext
    with batchable(model) if vectorized else contextlib.nullcontext():
        for rows in (rows.to(image_set.images.device) for rows in chunks if len(rows)):  # a share may be none
            images, labels = image_set.images[rows].to(hardware.device), image_set.labels[rows].to(hardware.device)
            with single_process(), autocast(), hardware.eager():
                gradients = (image_gradients if vectorized else batch_gradient)(model, objective, trained, images, labels)
            for name, gradient in gradients.items():
                total[name] += measure(gradient).sum(dim=0)
    model.train(was_training)
    return {name: value / count for name, value in sum_over_processes(total).items()}


def image_gradients(
    model: Recognizer, objective: Objective, trained: dict[str, Tensor], images: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    """∂ objective / ∂θ of each image, (B, …), by name."""

    def of_one(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return objective(functional_call(model, parameters, (image[None],)), label[None])

    constants = {name: parameter.detach() for name, parameter in trained.items()}
    return vmap(grad(of_one), in_dims=(None, 0, 0), randomness="error")(constants, images, labels)


@contextlib.contextmanager
def batchable(model: Recognizer) -> Iterator[None]:
    """What a batched gradient needs of the modules. Fused attention has no batching rule: vmap would call it image by image.
    Autocast may hand bf16 to a norm whose weights are fp32, which then raises RuntimeError: inputs are cast wherever a
    module's own weights are vectors."""
    with plain_attention(model), contextlib.ExitStack() as hooks:
        for module in model.modules():
            weights = [*module.parameters(recurse=False)]
            if weights and all(weight.ndim == 1 for weight in weights):
                cast = partial(_cast_inputs, dtype=weights[0].dtype)
                hooks.callback(module.register_forward_pre_hook(cast).remove)
        yield


def _cast_inputs(module: nn.Module, inputs: tuple, dtype: torch.dtype) -> tuple:
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)


def batch_gradient(
    model: Recognizer, objective: Objective, trained: dict[str, Tensor], images: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    """∂ objective / ∂θ of the batch, (1, …), by name."""
    gradients = torch.autograd.grad(objective(model(images), labels), [*trained.values()])
    return {name: gradient[None] for name, gradient in zip(trained, gradients, strict=True)}
