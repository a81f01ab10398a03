"""Selective synaptic dampening."""

import numpy as np
import torch


def squared_gradients(model, images, indices) -> dict[str, np.ndarray]:
    """The mean over single images of the squared gradient of their loss, one image after another."""
    total = {name: 0.0 for name, p in model.named_parameters() if p.requires_grad}
    for index in indices.tolist():
        model.zero_grad()
        model.head.loss(model.embed(images.images[index : index + 1]), images.labels[index : index + 1]).backward()
        for name in total:
            total[name] = total[name] + model.get_parameter(name).grad.numpy() ** 2
    return {name: value / len(indices) for name, value in total.items()}


def test_weights_that_matter_to_the_forgotten_alone_are_dampened(begin):
    begun = begin("ssd", "--selection", "2", "--dampening", "0.7", moved=False)
    task, model = begun.task, begun.model
    of_forget = squared_gradients(model, begun.images, task.forget_indices)
    of_all = squared_gradients(model, begun.images, torch.cat([task.forget_indices, task.remain_indices]))
    before = {name: model.get_parameter(name).detach().numpy().copy() for name in of_forget}
    head = model.head.weight.detach().clone()
    begun.method.end_task(model)
    dampened = 0
    for name, forget in of_forget.items():
        chosen = forget > 2 * of_all[name]
        factor = np.minimum(1, 0.7 * of_all[name] / np.maximum(forget, 1e-30))
        expected = np.where(chosen, factor * before[name], before[name])
        np.testing.assert_allclose(model.get_parameter(name).detach().numpy(), expected, rtol=1e-6, atol=1e-12)
        dampened += chosen.sum()
    assert 0 < dampened < sum(value.size for value in before.values())
    assert torch.equal(model.head.weight, head)


def test_it_makes_no_pass_and_no_more_epochs_for_that(begin):
    from util.training.optim import epochs_for

    begun = begin("ssd")
    assert begun.method.passes(begun.task, 0, 4) == []
    assert epochs_for(begun.method, begun.task, 4, 300) == 1
