import numpy as np
import pytest
import torch
from torch import nn

from backbone.dropout import FastDropout, drawn_mask, hash_32, hashed_mask, replace_dropout

MASKS = (drawn_mask, hashed_mask)


@pytest.mark.parametrize("draw", MASKS)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_masks_keep_the_share_they_name(draw, p):
    torch.manual_seed(0)
    keep, probability = draw(torch.Size((400, 500)), p)
    assert keep.dtype == torch.bool
    assert probability == pytest.approx(1 - p, abs=2**-16)
    error = (p * (1 - p) / keep.numel()) ** 0.5
    assert abs(keep.float().mean().item() - probability) < 4 * error


@pytest.mark.parametrize("draw", MASKS)
def test_elements_and_masks_are_independent(draw):
    """Correlations of neighbours in either direction, and of two masks drawn in turn, vanish as 1/√N."""
    torch.manual_seed(1)
    first, second = (draw(torch.Size((512, 512)), 0.5)[0].double() * 2 - 1 for _ in range(2))
    pairs = [(first[:, lag:], first[:, : 512 - lag]) for lag in (1, 2, 3, 4, 8, 64, 256)]
    pairs += [(first[lag:], first[: 512 - lag]) for lag in (1, 2, 128)]
    pairs += [(first, second), (first[1:], second[:-1])]
    for a, b in pairs:
        assert abs((a * b).mean().item()) < 4.5 / a.numel() ** 0.5


@pytest.mark.parametrize("draw", MASKS)
def test_the_generator_decides_the_mask(draw):
    masks = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        masks.append(draw(torch.Size((99, 7)), 0.5)[0])
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_the_hash_is_the_published_permutation():
    def lowbias32(x: int) -> int:
        x ^= x >> 16
        x = x * 0x7FEB352D % 2**32
        x ^= x >> 15
        x = x * 0x846CA68B % 2**32
        return x ^ x >> 16

    words = np.random.default_rng(0).integers(0, 2**32, 1000, dtype=np.uint32)
    hashed = hash_32(torch.from_numpy(words.view(np.int32))).numpy().view(np.uint32)
    assert hashed.tolist() == [lowbias32(int(word)) for word in words]


def test_dropout_scales_what_it_keeps_and_so_its_gradient():
    torch.manual_seed(0)
    dropout = FastDropout(0.25)
    x = torch.randn(64, 96, requires_grad=True)
    y = dropout(x)
    y.sum().backward()
    kept = y != 0
    assert 0.7 < kept.float().mean() < 0.8
    torch.testing.assert_close(y[kept], x[kept] / 0.75)
    torch.testing.assert_close(x.grad, kept / 0.75)
    assert torch.equal(dropout.eval()(x), x)
    assert FastDropout(1.0)(x).count_nonzero() == 0
    assert torch.equal(FastDropout(0.0)(x), x)


def test_compiled_dropout_uses_one_mask_forwards_and_backwards():
    dropout = torch.compile(FastDropout(0.25))
    x = torch.randn(64, 96, requires_grad=True)
    torch.manual_seed(0)
    y, again = dropout(x), dropout(x)
    y.sum().backward()
    kept = y != 0
    assert 0.7 < kept.float().mean() < 0.8
    torch.testing.assert_close(x.grad, kept / 0.75)
    assert not torch.equal(kept, again != 0)
    torch.manual_seed(0)
    assert torch.equal(dropout(x), y)


def test_every_dropout_is_replaced_once(make_recognizer):
    model = make_recognizer(pos_drop_rate=0.1, proj_drop_rate=0.2).eval()

    def dropouts() -> dict[str, nn.Module]:
        return {name: module for name, module in model.named_modules() if isinstance(module, nn.Dropout)}

    before = dropouts()
    replace_dropout(model)
    after = dropouts()
    assert {type(module) for module in after.values()} == {FastDropout}
    assert [(name, m.p, m.training) for name, m in after.items()] == [(name, m.p, m.training) for name, m in before.items()]
    replace_dropout(model)
    assert dropouts() == after
