"""torch's private multi-tensor kernels compute what a loop over the tensors does, gradients included."""

import torch

from util.runtime import foreach


def tensors(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in ((3, 4), (5,), (2, 2, 2))]


def test_all_tensors_in_one_call_are_as_one_by_one():
    a, b = tensors(0), tensors(1)
    expected = torch.stack([(x * y - y).norm() for x, y in zip(a, b, strict=True)])
    found = foreach.norms(foreach.differences(foreach.products(a, b), b))
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(norms.square().sum(), [*a, *b]) for norms in (found, expected)]
    torch.testing.assert_close(*gradients)
    doubled = foreach.products(a, torch.tensor(2.0))
    assert all(torch.equal(x, 2 * y) for x, y in zip(doubled, a, strict=True))
