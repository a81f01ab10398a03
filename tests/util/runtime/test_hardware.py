import itertools
from dataclasses import replace

import pytest
import torch
from timm.models.vision_transformer import Block

from backbone.last_block import ClassTokenBlock
from backbone.recognizer import to_device
from util.runtime import distributed
from util.runtime.errors import UsageError
from util.runtime.hardware import bf16_speedup, choose_hardware, plain_attention


def test_the_choices_of_a_cpu():
    auto = choose_hardware("cpu")
    assert auto.device.type == "cpu"
    assert not auto.fused_attention
    assert choose_hardware("cpu", "bf16").bf16
    assert not choose_hardware("cpu", "fp32").bf16
    assert "fp32" in choose_hardware("cpu", "fp32").describe()


def test_fused_and_plain_attention_agree(make_recognizer, cpu):
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    logits = []
    for fused in (True, False):
        model = to_device(make_recognizer(), replace(cpu, fused_attention=fused)).eval()
        assert {block.attn.fused_attn for block in model.backbone.blocks} == {fused}
        with torch.no_grad():
            logits.append(model(images))
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-3)


def test_the_last_block_serves_the_class_token_alone_unless_told_otherwise(make_recognizer):
    for choice, expected in (("auto", ClassTokenBlock), ("off", Block), ("on", ClassTokenBlock)):
        hardware = choose_hardware("cpu", "fp32", cls_only_last_block=choice)
        assert type(to_device(make_recognizer(), hardware).backbone.blocks[-1]) is expected


def test_autocast_runs_matrix_products_in_bf16():
    a = torch.ones(2, 2)
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        with choose_hardware("cpu", precision).autocast():
            assert (a @ a).dtype == dtype


def test_bf16_is_chosen_where_it_is_there_and_pays(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    for supported, speedup, chosen in ((True, 0.5, False), (True, 1.0, False), (True, 2.0, True), (False, 2.0, False)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda there=supported: there, raising=False)
        monkeypatch.setattr("util.runtime.hardware.bf16_speedup", lambda factor=speedup: factor)
        assert choose_hardware("cpu").bf16 == chosen


def test_the_speed_of_bf16_is_that_of_the_best_of_products_in_turn(monkeypatch):
    seconds = itertools.cycle([9.0, 9.0, 3.0, 1.0, 4.0, 2.0])  # fp32, bf16, fp32, …
    clock = itertools.accumulate(itertools.chain.from_iterable((100.0, taken) for taken in seconds))
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    assert bf16_speedup.__wrapped__() == 3.0


@pytest.mark.parametrize("device", ["abacus", "mps", f"cuda:{torch.cuda.device_count()}"])
def test_devices_that_are_not_there(device):
    with pytest.raises(UsageError, match="no device"):
        choose_hardware(device)


def test_compiling_is_decided_by_the_work(monkeypatch):
    auto = choose_hardware("cpu")
    assert auto.compile is None
    assert auto.resolve_compile(1e16).compile
    assert not auto.resolve_compile(1e9).compile
    assert not choose_hardware("cpu", compile="off").resolve_compile(1e16).compile
    assert choose_hardware("cpu", compile="on").resolve_compile(0).compile
    assert not choose_hardware("cpu", compile="on").resolve_compile(0).cuda_graphs
    with pytest.raises(UsageError, match="--cuda-graphs on does nothing here"):
        choose_hardware("cpu", cuda_graphs="on").resolve_compile(0)
    monkeypatch.setattr("util.runtime.hardware.can_compile", lambda device: False)
    assert not auto.resolve_compile(1e16).compile
    with pytest.raises(UsageError, match=r"torch.compile does not work here"):
        choose_hardware("cpu", compile="on").resolve_compile(0)


def test_compiled_blocks_compute_what_eager_ones_do(make_recognizer):
    hardware = choose_hardware("cpu", "fp32", compile="on").resolve_compile(0)
    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    labels = torch.arange(5)
    found = []
    for compiled in (False, True):
        model = to_device(make_recognizer(), hardware)
        if compiled:
            hardware.compile_modules([model.backbone, *model.backbone.blocks])
        loss = model.head.loss(model.embed(images), labels)
        loss.backward()
        with hardware.eager():
            assert model(images).isfinite().all()
        found.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    for eager, fast in zip(*found, strict=True):
        torch.testing.assert_close(fast, eager, rtol=1e-4, atol=1e-5)


def test_an_exception_leaves_neither_attention_nor_processes_changed(make_recognizer, cpu):
    model = to_device(make_recognizer(), replace(cpu, fused_attention=True))
    with pytest.raises(KeyError), plain_attention(model), distributed.single_process():
        raise KeyError
    assert all(block.attn.fused_attn for block in model.backbone.blocks)
    assert not distributed._single_process
