"""Counting without a GPU: agrees with what a CPU measures, with a GPU's autocast, and with bitsandbytes' bytes."""

import math
from bisect import bisect_right
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import accumulate

import bitsandbytes
import pytest
import torch
from bitsandbytes.autograd._functions import MatMul4Bit, MatMul8bitLt, MatmulLtState
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from focusdpo_lib import params
from focusdpo_lib.bench import __main__ as bench
from focusdpo_lib.bench import cases, count, models, report
from focusdpo_lib.bench.cases import Case
from focusdpo_lib.bench.count import CPU, NOWHERE, PackedLinear, as_on_a_gpu, given_memory, without_contents
from focusdpo_lib.bench.measure import CPU_ATTENTION, Operations, held_bytes
from focusdpo_lib.bench.steps import our_step
from focusdpo_lib.training import draws

CASES = [
    Case("flux", "small", 2, True, "bfloat16"),
    Case("flux", "small", 2, False, "bfloat16"),
    Case("sdxl", "small", 1, False, "bfloat16"),
    Case("sdxl", "small", 2, True, "bfloat16"),
]
# Counting takes as long as there are calls: a block without and one with a look at the references will do.
TWO_LEVELS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (64, 64),
    "transformer_layers_per_block": (1, 1),
    "attention_head_dim": (1, 2),
}
named = {"ids": lambda value: value.name if isinstance(value, Case) else None}


def ready(backbone, case):
    """An adapter on it, and what a step of one pair draws."""
    backbone.add_adapter(params.Training().lora.rank)
    if case.checkpointing:
        backbone.network.enable_gradient_checkpointing()
    pairs = models.load_pairs(case, backbone, 1)
    return backbone, pairs, draws({case.references: pairs}, params.Training(batch_size=1))(0)


class Operators(TorchDispatchMode):
    """The names of the operators that are called within this context, as the profiler knows them."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function._schema.name)
        return function(*args, **(kwargs or {}))


def peak_between_operators(task, operators):
    """The peak of the bytes that a task allocates, looked at where an outermost operator of these names ends.

    What one takes and returns while it runs depends on the processor: a convolution packs its weights, a product in
    bfloat16 on a processor without the instructions makes float32 of them. The count leaves workspaces out.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        task()
    events = watched.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    at, held = [time for time, _ in changes], [0, *accumulate(change for _, change in changes)]
    peak = end = 0
    for start, duration in sorted((e.start_ns(), -e.duration_ns()) for e in events if e.name() in operators):
        if start >= end:  # else within another
            end = start - duration
            peak = max(peak, held[bisect_right(at, end)])
    return peak


def test_bytes_live_as_long_as_their_tensors():
    with without_contents() as live:
        a = torch.empty(1000, dtype=torch.float32)  # 4000 bytes are 8 blocks of 512
        assert live.now == live.peak == 4096
        b = a[10:].view(-1)  # a view has no bytes of its own
        del a
        assert live.now == 4096
        b = b + 1  # the sum is there before the old one goes
        assert (live.now, live.peak) == (4096, 8192)
        assert live.peak_of(b.double) == 4096 + 8192
        del b
        assert live.now == 0
        assert live.peak_of(lambda: torch.empty(1)) == 512  # what was there before is past


def test_activations_live_until_the_backward_has_used_them():
    """y = w₂ (w₁ x): w₁'s backward needs x, w₂'s needs w₁ x, and both gradients are left."""
    with without_contents() as live:
        first, second = (nn.Linear(128, 128, bias=False) for _ in range(2))
        x = torch.empty(128, 128)
        square = 128 * 128 * 4
        assert live.now == 3 * square
        loss = second(first(x)).sum()
        assert live.now == 3 * square + square + 512  # w₁ x, kept for w₂'s gradient, and the loss
        loss.backward()
        del loss
        assert live.now == 5 * square


@pytest.mark.parametrize("case", CASES, **named)
def test_counts_agree_with_measurements_of_the_same_step(case, tmp_path, monkeypatch):
    if case.model == "sdxl":
        narrow = replace(case.sizes, network=case.sizes.network | TWO_LEVELS)
        monkeypatch.setitem(cases.SIZES, (case.model, case.size), narrow)
    # A checkpoint keeps the CPU's random state, 5 KB a block, which is no GPU's memory.
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", partial(checkpoint, preserve_rng_state=False))
    backbone, pairs, draw = ready(models.load(case, CPU, tmp_path), case)
    step = our_step(backbone, pairs, draw, "focusdpo")
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as measured:
        step()
    counted, *_ = ready(models.built(case, NOWHERE, tmp_path), case)
    with without_contents() as live:
        given_memory(counted, "bfloat16")
        task = our_step(counted, pairs, draw, "focusdpo")
        held = held_bytes(backbone.network, *([backbone.resampler] if case.model == "sdxl" else []))
        assert live.now == pytest.approx(held, rel=0.02)  # in whole blocks
        before = live.now
        with Operators() as called, Operations() as done:
            peak = live.peak_of(task) - before
    assert done.total == measured.get_total_flops()
    assert peak == pytest.approx(peak_between_operators(step, called.names), rel=0.01)


@pytest.mark.parametrize("model", ["flux", "sdxl"])
def test_what_a_forward_keeps_is_what_a_gpu_s_autocast_keeps(model, tmp_path, monkeypatch):
    """torch can pretend that fake tensors lie on a GPU, whose rules of autocast then hold; but it has no backward."""

    def kept(device):
        case = Case(model, "small", 2, False, "bfloat16")
        backbone, pairs, draw = ready(models.built(case, NOWHERE, tmp_path), case)
        with without_contents() as live, as_on_a_gpu():
            backbone.network.to_empty(device=device)
            backbone.device = torch.device(device)
            condition = pairs.conditioning[draw.rows].to(device)
            noised, t = torch.empty(pairs.win.shape, device=device), torch.empty(1, device=device)
            before, held = Counter(live.sizes.values()), live.now
            live.peak = live.now
            prediction = backbone.predict(noised, t, condition)
            assert prediction.grad_fn is not None
            return Counter(live.sizes.values()) - before, live.peak - held

    def flash(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
        parts = [x.bfloat16() for x in (query, key, value)]
        return torch.ops.aten._scaled_dot_product_flash_attention(*parts, dropout_p, is_causal, scale=scale)[0]

    emulated, peak = kept("cpu")
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(count, "IN_FLOAT32", ())  # a GPU's autocast knows by itself
    monkeypatch.setattr(count, "_fused_attention", flash)
    on_a_gpu, peak_there = kept("cuda")
    total = sum(size * times for size, times in on_a_gpu.items())
    differing = sum(size * times for size, times in ((emulated - on_a_gpu) + (on_a_gpu - emulated)).items())
    assert total > 1e5
    assert differing < 0.02 * total  # tables of positions and the like, which one device makes and the other is given
    assert peak == pytest.approx(peak_there, rel=0.01)


@pytest.mark.parametrize("weights", ["nf4", "int8"])
def test_a_packed_layer_holds_the_bytes_of_bitsandbytes(weights):
    plain = nn.Linear(256, 384, dtype=torch.bfloat16)
    if weights == "nf4":
        real = bitsandbytes.nn.Linear4bit(256, 384, compress_statistics=False, quant_type="nf4")  # as diffusers does
    else:
        real = bitsandbytes.nn.Linear8bitLt(256, 384, has_fp16_weights=False)
    real.load_state_dict(plain.state_dict())
    real = real.to("cpu")
    if weights == "int8":
        real(torch.randn(2, 256))  # quantized when it is first used
        held = [real.state.CB, real.state.SCB]
    else:
        held = [real.weight, real.weight.quant_state.absmax]
    packed = PackedLinear(plain, weights)
    expected = sum(tensor.numel() * tensor.element_size() for tensor in held)
    assert held_bytes(packed) == expected + 384 * 2  # and the bias


@pytest.mark.parametrize("weights", ["nf4", "int8"])
def test_a_packed_layer_keeps_what_bitsandbytes_keeps(weights):
    """NF4 nothing of the input, int8 the input; the unpacked matrix is there only while it multiplies."""
    x = torch.randn(64, 256, dtype=torch.bfloat16, requires_grad=True)
    if weights == "nf4":
        packed, state = bitsandbytes.functional.quantize_4bit(torch.randn(256, 256).bfloat16(), quant_type="nf4")
        kept = MatMul4Bit.apply(x, packed, None, None, state).grad_fn.tensors
    else:
        state = MatmulLtState()
        state.CB, state.SCB, _ = bitsandbytes.functional.int8_vectorwise_quant(torch.randn(256, 256).half())
        kept = MatMul8bitLt.apply(x, state.CB, None, None, state).grad_fn.tensors
    rows = sum(tensor.numel() * tensor.element_size() for tensor in kept if tensor is not None and tensor.dim() == 2
               and tensor.dtype == torch.bfloat16)  # fmt: skip
    with without_contents() as live:
        layer = PackedLinear(nn.Linear(256, 256, bias=False, dtype=torch.bfloat16), weights)
        x = torch.empty(64, 256, dtype=torch.bfloat16, requires_grad=True)
        y, matrix, row = x * 1, 256 * 256 * 2, 64 * 256 * 2
        before = live.now
        z = layer(y)
        assert live.now - before == row  # the output; y is held by its name
        del y
        assert live.now - before == rows
        assert live.peak >= before + matrix
        z.sum().backward()
        assert x.grad.shape == x.shape


@pytest.mark.parametrize("family", ["flux_uno", "sdxl_ip"])
def test_the_layers_that_are_packed_are_those_that_the_loader_quantizes(family, tmp_path, bitsandbytes_on_cpu):
    case = Case(family.partition("_")[0], "small", 1, False, "nf4")
    real = models.load(case, CPU, tmp_path)
    real.add_adapter(4)
    quantized = {name for name, m in real.network.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    counted, *_ = ready(models.built(case, NOWHERE, tmp_path), case)
    with without_contents():
        given_memory(counted, "nf4")
    packed = {name for name, m in counted.network.named_modules() if isinstance(m, PackedLinear)}
    assert packed == {name for name in quantized if ".lora_" not in name}


def test_full_sizes_are_counted_where_there_is_no_gpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    sizes = cases.SIZES["flux", "small"]
    wide = {"num_single_layers": 1, "num_attention_heads": 8}  # counting takes as long as there are calls
    monkeypatch.setitem(cases.SIZES, ("flux", "full"), replace(sizes, network=sizes.network | wide))
    bench.main(["--size", "full", "--only", "flux", "2ref", "nf4", "--out", str(tmp_path)])
    found = report.read_results(tmp_path)
    assert list(found) == ["flux-full-2ref-nf4", "flux-full-2ref-checkpointing-nf4"]
    whole, again = found.values()
    assert {entry["status"] for entry in found.values()} == {"counted"}
    assert again["steps"]["focusdpo"]["peak_bytes"] < whole["steps"]["focusdpo"]["peak_bytes"]
    assert again["steps"]["focusdpo"]["operations"] > whole["steps"]["focusdpo"]["operations"]
    copy = whole["weights_bytes"] - whole["optimizer_bytes"]["adamw"] / 2  # the plain reading's, of all but the adapter
    assert whole["ratios"]["bytes saved"] > 0.5 * copy
    assert whole["optimizer_bytes"]["adamw"] == 4 * whole["optimizer_bytes"]["adamw_8bit"]
    page = (tmp_path / "README.md").read_text()
    assert "## Counted: full size" in page
    assert "| FocusDPO's step / DPO's, full size | ≤ 1.03 | – | unmeasured |" in page
    row = next(line for line in page.splitlines() if line.startswith("| FocusDPO's step and AdamW in 8 bits"))
    total = again["steps"]["focusdpo"]["peak_bytes"] + again["optimizer_bytes"]["adamw_8bit"]
    assert row.endswith(f"| ≤ 24 GB | {total / 1e9:.4g} GB (1 case, counted) | met |")
    bench.main(["--size", "full", "--only", "flux", "2ref", "nf4", "--out", str(tmp_path)])
    assert capsys.readouterr().out.count("kept, taken before") == 2


def test_packing_shrinks_the_base_and_spares_the_adapter(tmp_path):
    case = Case("flux", "small", 1, False, "nf4")
    sizes = {}
    for weights in ("bfloat16", "int8", "nf4"):
        backbone, *_ = ready(models.built(case, NOWHERE, tmp_path), case)
        with without_contents():
            given_memory(backbone, weights)
            adapter = [p for n, p in backbone.network.named_parameters() if ".lora_" in n]
            assert {p.dtype for p in adapter if p.requires_grad} == {torch.float32}
            assert {p.dtype for p in adapter if not p.requires_grad} == {torch.bfloat16}  # UNO's
            sizes[weights] = held_bytes(backbone.network) - held_bytes(nn.ParameterList(adapter))
    linear = [m for m in backbone.network.modules() if isinstance(m, PackedLinear)]
    weights = sum(math.prod(m.features) for m in linear)
    assert sizes["bfloat16"] - sizes["int8"] == weights - sum(4 * m.features[0] for m in linear)
    assert sizes["bfloat16"] - sizes["nf4"] == weights * 1.5 - weights / 64 * 4
