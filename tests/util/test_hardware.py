import pytest
import torch

from util.errors import UsageError
from util.hardware import choose_hardware


def test_the_choices_of_a_cpu():
    auto = choose_hardware("cpu")
    assert auto.device.type == "cpu"
    assert not auto.fused_attention
    assert choose_hardware("cpu", "bf16").bf16
    assert not choose_hardware("cpu", "fp32").bf16
    assert "fp32, fused attention" in choose_hardware("cpu", "fp32", "fused").describe()


def test_fused_and_plain_attention_agree(make_recognizer):
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    logits = []
    for attention in ("fused", "plain"):
        model = choose_hardware("cpu", "fp32", attention).place(make_recognizer()).eval()
        assert {block.attn.fused_attn for block in model.backbone.blocks} == {attention == "fused"}
        with torch.no_grad():
            logits.append(model(images))
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-3)


def test_autocast_runs_matrix_products_in_bf16():
    a = torch.ones(2, 2)
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        with choose_hardware("cpu", precision).autocast():
            assert (a @ a).dtype == dtype


@pytest.mark.parametrize("device", ["abacus", "mps", f"cuda:{torch.cuda.device_count()}"])
def test_devices_that_are_not_there(device):
    with pytest.raises(UsageError, match="--device"):
        choose_hardware(device)
