"""SalUn: relabelling of the salient weights alone."""

import numpy as np
import pytest
import torch


def test_the_loss_is_its_formula(begin, arithmetic, shift_labels):
    shift_labels()
    begun = begin("salun", "--lambda", "3")
    batch = begun.batch()
    losses = begun.method.loss(begun.model, batch)
    images, labels = batch.split(batch.images), batch.split(batch.labels)
    forget = arithmetic.cross_entropy(arithmetic.logits(begun.model, images["forget"]), (labels["forget"] + 1) % 6)
    remain = arithmetic.cross_entropy(arithmetic.logits(begun.model, images["remain"]), labels["remain"])
    assert losses["forget"].item() == pytest.approx(forget, rel=1e-9)
    assert losses["remain"].item() == pytest.approx(remain, rel=1e-9)
    assert losses["total"].item() == pytest.approx(forget + 3 * remain, rel=1e-9)


@pytest.mark.parametrize("share", [0.5, 0.1, 1.0])
def test_the_weights_with_the_largest_gradient_of_the_forgotten_are_trained(begin, share):
    begun = begin("salun", "--saliency", str(share), moved=False)
    model, task, images = begun.model, begun.task, begun.images
    wanted = {}
    for index in task.forget_indices.tolist():
        loss = begun.before.head.loss(begun.before.embed(images.images[[index]]), images.labels[[index]])
        for name, gradient in zip(
            dict(begun.before.backbone.named_parameters()),
            torch.autograd.grad(loss, [*begun.before.backbone.parameters()]),
            strict=True,
        ):
            wanted[name] = wanted.get(name, 0) + gradient.numpy()
    sizes = np.sort(np.concatenate([np.abs(g).ravel() for g in wanted.values()]))[::-1]
    least = sizes[max(0, round(share * len(sizes)) - 1)]
    begun.method.loss(model, begun.batch())["total"].backward()
    reached = 0
    for name, parameter in model.backbone.named_parameters():
        salient = np.abs(wanted[name]) >= least * (1 - 1e-9)
        assert (parameter.grad.numpy()[~salient] == 0).all()
        reached += (parameter.grad.numpy()[salient] != 0).sum()
    assert reached >= 0.9 * share * len(sizes)


def test_after_the_task_gradients_are_whole_again(begin):
    begun = begin("salun", "--saliency", "0.1")
    batch = begun.batch()
    begun.method.end_task(begun.model)
    begun.method.loss(begun.model, batch)["total"].backward()
    reached = [(p.grad != 0).float().mean().item() for p in begun.model.backbone.parameters()]
    assert min(reached) > 0.9
