"""The benchmark: its plain reading computes the same loss, its counts agree with sums by hand, its runs go on."""

import json
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from focusdpo_lib import backbones, params, provenance
from focusdpo_lib.backbones import Conditioning, FluxUno, subject_lora
from focusdpo_lib.bench import __main__ as bench
from focusdpo_lib.bench import models, report, steps
from focusdpo_lib.bench.cases import SIZES, Case, cases
from focusdpo_lib.bench.measure import held_bytes, interleaved, operations, peak_bytes
from focusdpo_lib.bench.plain import plain_objective, reference_copy
from focusdpo_lib.training import draws, step_objective

CPU = torch.device("cpu")
SMALL = [Case(model, "small", 2, False, "bfloat16") for model in ("flux", "sdxl")]
ids = {"ids": lambda value: value.name if isinstance(value, Case) else None}


def with_adapter(backbone):
    """An adapter that has learnt something, so that policy and reference model differ."""
    backbone.add_adapter(2)
    torch.manual_seed(0)
    for parameter in backbone.adapter_parameters():
        nn.init.normal_(parameter, std=0.2)
    return backbone


@pytest.fixture
def batch(backbone, prepared):
    """A float32 FLUX with a trained adapter, and two pairs with two references."""
    pairs = prepared[2]
    return with_adapter(backbone), pairs, draws({2: pairs}, params.Training(batch_size=2))(0)


@pytest.fixture
def random_batch(request, tmp_path):
    """The same for a small random model in bfloat16, as a benchmark's case has it."""
    case = request.param
    backbone = with_adapter(models.load(case, CPU, tmp_path))
    pairs = models.load_pairs(case, backbone, 2)
    return backbone, pairs, draws({case.references: pairs}, params.Training(batch_size=2))(0)


def gradients(backbone, loss):
    loss.backward()
    found = [p.grad.clone() for p in backbone.adapter_parameters()]
    for parameter in backbone.adapter_parameters():
        parameter.grad = None
    return found


# --- the plain reading -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["reference", "policy"])
def test_the_plain_reading_computes_the_loss_and_gradient_of_a_step(batch, network):
    backbone, pairs, draw = batch
    objective, masks = params.Objective(beta=10.0), params.Masks(network=network)
    ours = step_objective(backbone, pairs, draw, objective, masks)[0]
    our_gradients = gradients(backbone, ours.loss)
    plain = plain_objective(backbone, reference_copy(backbone), pairs, draw, objective, masks)
    torch.testing.assert_close(plain.margin, ours.margin, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain.loss, ours.loss)
    assert ours.margin.abs().max() > 1e-3  # margins of 0 would agree with anything
    assert max(g.abs().max() for g in our_gradients) > 1e-3
    torch.testing.assert_close(gradients(backbone, plain.loss), our_gradients, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("random_batch", SMALL, indirect=True, **ids)
def test_the_plain_reading_agrees_on_the_random_models_too(random_batch):
    backbone, pairs, draw = random_batch
    objective, masks = params.Objective(beta=10.0), params.Masks()
    ours = step_objective(backbone, pairs, draw, objective, masks)[0].parts
    plain = plain_objective(backbone, reference_copy(backbone), pairs, draw, objective, masks).parts
    ours = {name: ours[name] for name in plain}  # without what only a log keeps
    torch.testing.assert_close(plain, ours, rtol=2e-2, atol=1e-3)  # bfloat16 rounds by 2⁻⁸


def test_the_reference_copy_has_weights_of_its_own_and_no_adapter(batch):
    backbone, pairs, draw = batch
    twin = reference_copy(backbone)
    condition, t = pairs.conditioning[draw.rows], draw.t
    with torch.no_grad():
        policy = backbone.predict(pairs.win[draw.rows], t, condition)
        with backbone.reference_model():
            reference = backbone.predict(pairs.win[draw.rows], t, condition)
        torch.testing.assert_close(twin.predict(pairs.win[draw.rows], t, condition), reference)
    assert (policy - reference).abs().max() > 1e-2
    own = {p.data_ptr() for p in twin.network.parameters()}
    assert own.isdisjoint(p.data_ptr() for p in backbone.network.parameters())
    adapter = sum(p.numel() for p in backbone.adapter_parameters())
    assert held_bytes(twin.network) == held_bytes(backbone.network) - 4 * adapter


# --- operations --------------------------------------------------------------------------------------------------


def test_a_linear_layer_counts_two_operations_a_multiply_add_forward_and_backward():
    layer, x = nn.Linear(5, 7).requires_grad_(False), torch.randn(2, 3, 5, requires_grad=True)
    forward = 2 * (2 * 3) * 5 * 7
    assert operations(lambda: layer(x), layer) == forward
    assert operations(lambda: layer(x).sum().backward(), layer) == 2 * forward  # no gradient of frozen weights
    layer.requires_grad_(True)
    assert operations(lambda: layer(x).sum().backward(), layer) == 3 * forward


@pytest.mark.parametrize(("kernel", "backward"), [(SDPBackend.MATH, 2), (SDPBackend.FLASH_ATTENTION, 2.5)])
def test_attention_counts_its_products_and_the_fused_kernel_one_more(kernel, backward):
    query = torch.randn(2, 4, 10, 8, requires_grad=True)  # (B, heads, P, d)
    key = torch.randn(2, 4, 6, 8, requires_grad=True)
    forward = 2 * (2 * 2 * 4 * 10 * 6 * 8)  # q kᵀ and the weighted sum of v

    def attend():
        with sdpa_kernel(kernel):
            return F.scaled_dot_product_attention(query, key, key)

    assert operations(attend, nn.Identity()) == forward
    assert operations(lambda: attend().sum().backward(), nn.Identity()) == (1 + backward) * forward


class Quantized(nn.Linear):
    """Stands for a layer of bitsandbytes: packed integers and a kernel that no counter knows."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.weight = nn.Parameter(torch.zeros(inputs * outputs // 2, 1, dtype=torch.uint8), requires_grad=False)

    def forward(self, x):
        return x.new_ones(*x.shape[:-1], self.out_features)


def test_a_quantized_layer_counts_as_a_plain_one_and_is_itself_again_afterwards():
    layer, x = Quantized(6, 4), torch.randn(3, 6, requires_grad=True)
    other = Quantized(4, 5)
    assert operations(lambda: layer(x).sum().backward(), layer) == 2 * (2 * 3 * 6 * 4)
    assert operations(lambda: other(layer(x)), layer, other) == 2 * 3 * 6 * 4 + 2 * 3 * 4 * 5
    assert layer(x).eq(1).all()


def counted_by_hand(backbone, forward, tokens):
    """Two operations for every weight of every linear layer and row, and attention over all tokens in every block."""
    total = 0

    def hook(layer, inputs, output):
        nonlocal total
        total += 2 * inputs[0].numel() * layer.out_features

    handles = [m.register_forward_hook(hook) for m in backbone.network.modules() if isinstance(m, nn.Linear)]
    forward()
    for handle in handles:
        handle.remove()
    network = backbone.network
    width = network.config.num_attention_heads * network.config.attention_head_dim
    blocks = len(network.transformer_blocks) + len(network.single_transformer_blocks)
    return total + 2 * blocks * 4 * tokens**2 * width  # a batch of two


def test_the_floor_is_a_forward_counted_as_by_hand(backbone, prepared):
    pairs = prepared[2]
    draw = draws({2: pairs}, params.Training(batch_size=2))(0)
    tokens = 12 + 8 * 8 + 2 * 4 * 4  # text, target, two references of 32 pixels, 8 pixels a token
    forward = steps.winners_forward(backbone, pairs, draw, masked=False)
    assert operations(forward, backbone.network) == counted_by_hand(backbone, forward, tokens)


def counts(backbone, pairs, draw):
    """Operations of one forward of the winners and of every step."""
    found = {"forward": steps.winners_forward(backbone, pairs, draw, masked=False)}
    found |= {name: steps.our_step(backbone, pairs, draw, name) for name in steps.OBJECTIVES}
    found["plain"] = steps.plain_step(backbone, reference_copy(backbone), pairs, draw)
    return {name: operations(step, backbone.network) for name, step in found.items()}  # nothing is quantized here


@pytest.mark.parametrize("random_batch", SMALL, indirect=True, **ids)
def test_masks_cost_no_operations_but_a_u_net_s_look_at_each_reference_and_the_plain_reading_one_forward_more(
    random_batch,
):
    backbone, pairs, draw = random_batch
    found = counts(*random_batch)
    looks = 0
    for view, tokens in zip(pairs.conditioning.views, pairs.conditioning.references, strict=False):
        alone = Conditioning(view.text, view.pooled, (tokens,))[draw.rows]
        latents = view.latents[draw.rows]

        @torch.no_grad()
        def look(latents=latents, alone=alone):
            backbone.predict(latents, draw.t, alone)

        with backbone.reference_model():
            looks += operations(look, backbone.network)
    assert (looks > 0) == (backbone.part == "unet")
    assert found["focusdpo"] == found["dpo"] + looks
    assert found["plain"] == found["focusdpo"] + found["forward"]
    # Above the floor: LoRA, and attention's backward, twice its forward. Below: what no gradient passes in a U-Net.
    for name in steps.OBJECTIVES:
        assert 0.9 < found[name] / (steps.FLOOR[name] * found["forward"]) < 1.15


def test_gradient_checkpointing_adds_the_blocks_of_one_more_policy_pass(batch):
    plainly = counts(*batch)
    backbone = batch[0]
    backbone.network.enable_gradient_checkpointing()
    again = counts(*batch)
    assert again["forward"] == plainly["forward"]
    added = (again["focusdpo"] - plainly["focusdpo"]) / (2 * plainly["forward"])
    assert 0.9 < added < 1.2  # of winner and loser: all but embedders and output, and LoRA on top
    assert again["plain"] - plainly["plain"] == again["focusdpo"] - plainly["focusdpo"]


def test_where_products_would_not_be_seen_none_are_counted():
    layer = nn.Linear(3, 5)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"use torch\.no_grad"):
        operations(lambda: layer(torch.ones(2, 3)))
    with torch.no_grad():
        assert operations(lambda: layer(torch.ones(2, 3))) == 2 * 2 * 3 * 5


# --- memory and seconds ------------------------------------------------------------------------------------------


def test_peak_memory_on_a_cpu_is_the_weights_and_the_most_that_was_allocated_at_one_time():
    layer = nn.Linear(10, 10)

    def task():
        first = torch.empty(1_000_000, dtype=torch.uint8)
        second = torch.empty(3_000_000, dtype=torch.uint8)
        del first
        third = torch.empty(500_000, dtype=torch.uint8)
        del second, third

    assert peak_bytes(task, layer) == pytest.approx(4_000_000 + 4 * 110, abs=1000)
    assert peak_bytes(task, layer, layer) == pytest.approx(4_000_000 + 2 * 4 * 110, abs=1000)


def test_interleaved_tasks_come_once_a_round_and_after_each_other_and_the_first_rounds_are_for_warming_up():
    order = []
    seconds = interleaved({name: lambda name=name: order.append(name) for name in "abc"}, rounds=40, warm_up=2)
    rounds = ["".join(order[at : at + 3]) for at in range(0, 126, 3)]
    assert set(rounds) == {"abc", "acb", "bac", "bca", "cab", "cba"} and len(rounds) == 42
    assert {name: len(values) for name, values in seconds.items()} == dict.fromkeys("abc", 40)


# --- models and cases --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "published"), [("flux", 11_901_408_320), ("sdxl", 2_567_463_684)])
def test_the_full_sizes_have_the_parameters_of_the_published_models(model, published):
    network = models.build_pipeline(Case(model, "full", 1, False, "bfloat16"), torch.device("meta"))
    network = network.transformer if model == "flux" else network.unet
    assert sum(p.numel() for p in network.parameters()) == published
    assert network.dtype == torch.bfloat16


@pytest.mark.parametrize("model", ["flux", "sdxl"])
def test_small_and_full_sizes_differ_in_numbers_only(model):
    small, full = SIZES[model, "small"], SIZES[model, "full"]
    for sizes in (small, full):
        network = sizes.network
        text = network["joint_attention_dim" if model == "flux" else "cross_attention_dim"]
        assert sizes.text[1] == text
        if model == "flux":
            assert network["in_channels"] == 4 * sizes.latents[0]
            assert sum(network["axes_dims_rope"]) == network["attention_head_dim"]
            assert sizes.pooled == network["pooled_projection_dim"]
        else:
            assert (
                network["projection_class_embeddings_input_dim"]
                == sizes.pooled + 6 * network["addition_time_embed_dim"]
            )
    assert small.network.keys() == full.network.keys()


@pytest.mark.parametrize("case", SMALL, **ids)
def test_a_saved_random_model_loads_as_a_published_one_does(case, tmp_path):
    folder = models.saved(case, CPU, tmp_path)
    assert models.saved(case, CPU, tmp_path) == folder  # written once
    family = {"flux": {"family": "flux_uno"}, "sdxl": {"family": "sdxl_ip", "ip_adapter": str(folder / "ip_adapter")}}
    backbone = backbones.load(params.Backbone(model=str(folder), precision="float32", **family[case.model]))
    config = {name: getattr(backbone.network.config, name) for name in case.sizes.network}
    assert json.dumps(config) == json.dumps(case.sizes.network)
    pairs = models.load_pairs(case, backbone, 1)
    draw = draws({2: pairs}, params.Training(batch_size=1))(0)
    backbone.add_adapter(2)
    loss = step_objective(backbone, pairs, draw, params.Objective(), params.Masks())[0].loss
    assert loss.item() == pytest.approx(torch.log(torch.tensor(2.0)).item())


def test_the_subject_lora_is_what_the_loader_makes_of_uno_s_file(tmp_path):
    case = Case("flux", "small", 1, False, "bfloat16")
    ours = models.load(case, CPU, tmp_path).network
    pipeline, rank, state = models.build_pipeline(case, CPU), case.sizes.subject_rank, {}
    for layer, (inputs, outputs) in subject_lora._layers(pipeline.transformer).items():
        state[f"{layer}.down.weight"] = torch.randn(rank, inputs).bfloat16()
        state[f"{layer}.up.weight"] = torch.randn(outputs, rank).bfloat16()
    save_file(state, tmp_path / "dit_lora.safetensors")
    subject_lora.load_subject_lora(pipeline, tmp_path / "dit_lora.safetensors")
    loaded, built = (
        {name: (p.shape, p.dtype, p.requires_grad) for name, p in network.named_parameters()}
        for network in (pipeline.transformer.requires_grad_(False), ours)
    )
    assert built == loaded and any(".subject." in name for name in built)
    full = models.build_pipeline(replace(case, size="full"), torch.device("meta"))
    full = models.with_subject_lora(FluxUno(full, precision="bfloat16"), replace(case, size="full")).network
    subject = sum(p.numel() for name, p in full.named_parameters() if ".subject." in name)
    # 19 double blocks of 8 layers 3072 → 3072; 38 single ones of 3 such and one 15360 → 3072
    assert subject == 512 * (19 * 8 * 6144 + 38 * (3 * 6144 + 18432)) == 1_195_376_640


def test_each_subject_of_random_pairs_has_tokens_of_its_own(tmp_path):
    case = SMALL[0]
    backbone = models.load(case, CPU, tmp_path)
    prior = models.random_pairs(case, backbone, 3).prior_tokens
    assert prior.shape == (3, 2, 8 * 8)
    assert prior.sum(1).max() == 1 and prior.mean(-1).eq(0.25).all()


# --- runs --------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_products(monkeypatch):
    """The matrix rate by matrices that take no second."""
    monkeypatch.setattr(steps, "matrix_rate", partial(steps.matrix_rate, side=128))


def test_a_small_case_runs_from_end_to_end(tmp_path, small_products):
    name = "flux-small-2ref-checkpointing-bfloat16"
    bench.main(["--only", name, "--rounds", "1", "--out", str(tmp_path)])
    entries = report.read_results(tmp_path)
    assert list(entries) == [name]
    entry = entries[name]
    assert entry["status"] == "measured"
    assert entry["steps"].keys() == {"sft", "dpo", "focusdpo", "plain"}
    assert all(cost["seconds"] > 0 and cost["peak_bytes"] > entry["weights_bytes"] for cost in entry["steps"].values())
    assert entry["ratios"]["bytes saved"] > 0
    assert entry["machine"]["packages"]["torch"] == torch.__version__.partition("+")[0]
    page = (tmp_path / "README.md").read_text()
    assert "| FocusDPO's step / DPO's, full size | ≤ 1.03 | – | unmeasured |" in page
    assert provenance.device()["device"] in page


@pytest.fixture
def measured(monkeypatch):
    """The names of the cases that were measured, without measuring any; `killed_at` interrupts at one."""
    names, status = [], {"killed_at": None}

    def attempted(case, *_):
        if case.name == status["killed_at"]:
            raise KeyboardInterrupt
        names.append(case.name)
        return {"status": "does not fit"}

    monkeypatch.setattr(bench, "attempted", attempted)
    return names, status


def test_a_killed_run_keeps_the_cases_done_and_goes_on(measured, tmp_path):
    names, status = measured
    wanted = cases("small")[:3]
    status["killed_at"] = wanted[1].name
    with pytest.raises(KeyboardInterrupt):
        bench.run(wanted, CPU, tmp_path)
    assert list(report.read_results(tmp_path)) == [wanted[0].name]
    status["killed_at"] = None
    bench.run(wanted, CPU, tmp_path)
    assert names == [case.name for case in wanted]
    assert list(report.read_results(tmp_path)) == names


def test_a_case_is_measured_anew_when_asked_or_when_its_entry_says_something_else(measured, tmp_path, monkeypatch):
    names, _ = measured
    wanted = cases("small")[:1]
    for expected, change in ((1, {}), (1, {}), (2, {"again": True}), (3, {"rounds": 4}), (4, {"batch": 3})):
        bench.run(wanted, CPU, tmp_path, **change)
        assert len(names) == expected
    facts = provenance.facts()
    monkeypatch.setattr(provenance, "facts", lambda: facts | {"device": "another"})
    bench.run(wanted, CPU, tmp_path, batch=3)
    assert len(names) == 5


def test_what_does_not_fit_is_said_and_the_run_goes_on(tmp_path, monkeypatch, small_products):
    def too_large(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    case = SMALL[0]
    monkeypatch.setattr(steps, "reference_copy", too_large)
    entry = steps.attempted(case, CPU, 1, 1, tmp_path)
    assert entry["status"] == "measured" and entry["steps"]["focusdpo"]["seconds"] > 0
    assert entry["steps"]["plain"] == {"status": "does not fit"} and "bytes saved" not in entry["ratios"]
    page = report.page({case.name: {"case": asdict(case), "machine": provenance.facts(), **entry}})
    assert page.count("the plain reading does not fit") == 2
    monkeypatch.setattr(models, "load", too_large)
    bench.run([case], CPU, tmp_path)
    assert report.read_results(tmp_path)[case.name]["status"] == "does not fit"
    assert f"| {case.name} | does not fit |" in (tmp_path / "README.md").read_text()


def test_words_that_name_no_case_are_refused(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--only", "flux", "sdxl"])
    assert "no case has all of" in capsys.readouterr().err


def test_a_goal_is_judged_by_its_worst_case():
    def entry(model, value, status="measured"):
        return {"status": status, "case": {"model": model}, "ratios": {"plain / focusdpo": value}}

    goal = report.Goal("", report.toybox, report.ratio("plain / focusdpo"), 1.3, True)
    assert goal.verdict([entry("flux", 2.0)]) == ("–", "unmeasured")
    assert goal.verdict([entry("toybox", 2.0), entry("toybox", 1.25)]) == (
        "1.25 (the worst of 2 cases, measured)",
        "missed",
    )
    assert goal._replace(at_least=False).verdict([entry("toybox", 1.2)]) == ("1.2 (1 case, measured)", "met")
    counted = entry("toybox", 1.4, "counted")
    assert goal.verdict([counted]) == ("1.4 (1 case, counted)", "met")
    assert goal.verdict([counted, entry("toybox", 1.2)]) == ("1.2 (1 case, measured)", "missed"), "measured comes first"
