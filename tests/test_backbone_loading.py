"""Bases that cannot be loaded, held in less memory, or do not fit: one sentence each, and what to do."""

import http.server
import json
import threading

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_both_families import FAMILIES, policy, run, settings
from tiny_fixtures import build_tiny_flux
from tiny_training import TRAINING, refusal

from focusdpo_lib import backbones, params
from focusdpo_lib.backbones import loading
from focusdpo_lib.params import ParameterError
from focusdpo_lib.toybox.pipelines import build_autoencoder
from focusdpo_lib.toybox.unet import new_backbone, save_backbone
from focusdpo_lib.training import ADAPTER, TrainingError, adapter_card, memory, new_optimizer, train
from focusdpo_lib.training.memory import MemoryAdvice, MemoryShortageError, advice
from focusdpo_lib.training.pairs import prepare

# --- UNO's file ---


@pytest.fixture(scope="module")
def uno(tmp_path_factory):
    """UNO's LoRA for the tiny transformer of width 32, 2 double and 2 single blocks, in its released layout."""
    torch.manual_seed(0)
    width, mlp, rank, state = 32, 128, 4, {}
    for i in range(2):
        for stream in "12":
            state |= layer(f"double_blocks.{i}.processor.qkv_lora{stream}", width, 3 * width, rank)
            state |= layer(f"double_blocks.{i}.processor.proj_lora{stream}", width, width, rank)
        state |= layer(f"single_blocks.{i}.processor.qkv_lora", width, 3 * width, rank)
        state |= layer(f"single_blocks.{i}.processor.proj_lora", width + mlp, width, rank)
    path = tmp_path_factory.mktemp("uno") / "dit_lora.safetensors"
    save_file(state, path)
    return path


def layer(name, inputs, outputs, rank):
    down, up = torch.randn(rank, inputs) / inputs**0.5, torch.randn(outputs, rank) / rank**0.5
    return {f"{name}.down.weight": down, f"{name}.up.weight": up}


@torch.no_grad()
def test_uno_s_file_loads_by_file_and_by_folder(tiny_flux, uno, caplog):
    plain = backbones.load(settings("flux_uno", tiny_flux))
    for source in (uno, uno.parent):
        with_uno = backbones.load(settings("flux_uno", tiny_flux, subject_lora=str(source)))
        photo = torch.rand(1, 3, 32, 32) * 2 - 1
        condition, x, t = with_uno.condition(["a mug"], [photo]), torch.randn(1, 8, 16, 16), torch.tensor([0.5])
        assert not torch.allclose(with_uno.predict(x, t, condition), plain.predict(x, t, condition), atol=1e-3)
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("single_blocks.1.processor.proj_lora.up.weight", None, "the key {name} is missing"),
        ("double_blocks.0.processor.qkv_lora2.down.weight", (4, 30), "the key {name} has the shape (4, 30) where the"),
        ("double_blocks.1.processor.proj_lora1.up.weight", (32, 5), "where the model needs (32, 4)"),
    ],
)
def test_a_key_of_uno_s_file_that_is_missing_or_misshapen_is_named(tiny_flux, uno, tmp_path, name, change, expected):
    state = load_file(uno)
    del state[name]
    if change:
        state[name] = torch.zeros(change)
    save_file(state, tmp_path / "uno.safetensors")
    message = refusal(model=str(tiny_flux), subject_lora=f"{tmp_path}/uno.safetensors")
    assert expected.format(name=name) in message and "uno.safetensors" in message


# --- The hub ---


@pytest.fixture
def gated_hub(monkeypatch):
    """A hub that answers as the real one does for a gated model and no token."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = json.dumps({"error": "Access to model is restricted."}).encode()
            self.send_response(401)
            self.send_header("X-Error-Code", "GatedRepo")
            self.send_header("X-Error-Message", "Access to model gated/model is restricted. You must be authenticated.")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(b"" if self.command == "HEAD" else body)

        do_HEAD = do_GET

        def log_message(self, *words):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                        address + "/{repo_id}/resolve/{revision}/{filename}")  # fmt: skip
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", address)
    yield
    server.shutdown()


def test_a_gated_model_without_a_token_says_what_to_do(gated_hub, tiny_flux, tmp_path):
    message = refusal(model="gated/model")
    assert message.startswith("the model gated/model cannot be loaded (it is gated): accept its licence")
    assert "hf auth login" in message
    message = refusal(model=str(tiny_flux), subject_lora="gated/lora")
    assert message.startswith("the subject LoRA gated/lora cannot be loaded (it is gated)")
    use = params.Backbone(model="gated/model")
    assert backbones.pinned(use, tmp_path) == use and not any(tmp_path.iterdir())


@pytest.mark.parametrize("extra", [{"model": "not/cached"}, {"subject_lora": "not/cached"}])
def test_offline_what_is_not_in_the_cache_is_named(tiny_flux, monkeypatch, tmp_path, extra):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = refusal(**{"model": str(tiny_flux)} | extra)
    assert "not/cached cannot be loaded (not in the cache, and the hub is out of reach): go online once" in message


def test_offline_a_model_loads_from_the_cache(tiny_flux, monkeypatch, tmp_path, capfd, caplog):
    """The cache as huggingface_hub lays it out: snapshots under the commit that a pinned revision names."""
    revision = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "hub"
    snapshot = cache / "models--someone--tiny" / "snapshots" / revision
    build_tiny_flux().save_pretrained(snapshot)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.HF_HUB_CACHE", str(cache), raising=False)
    use = params.Backbone(model="someone/tiny", revision=revision, precision="float32")
    capfd.readouterr(), caplog.clear()
    assert len(backbones.load(use).transformer.transformer_blocks) == 2
    assert capfd.readouterr() == ("", "")  # no progress bars for what is here …
    assert not caplog.records  # … no complaint that the hub is not
    assert backbones.identity(use) == f"someone/tiny@{revision}"


# --- Less memory ---


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("weights", "stored"), [("int8", torch.int8), ("nf4", torch.uint8)])
def test_a_quantized_base_trains_float32_adapters(family, weights, stored, bitsandbytes_on_cpu, pairs, tmp_path):
    if family == "flux_uno":
        build_tiny_flux(head_dim=32, text_dim=64).save_pretrained(tmp_path / "model")
    else:
        sizes = {"image_width": 32, "hidden": 64, "channels": (64, 128), "blocks": 1, "text_dim": 32}
        save_backbone(new_backbone(build_autoencoder((8, 8, 8)), **sizes), tmp_path / "model", torch.float32)
    use = settings(family, tmp_path / "model", weights=weights, precision="bfloat16")
    data = {1: prepare(backbones.load(use, parts="encoders"), pairs, params.Masks())[1]}
    model = backbones.load(use, parts="network")
    layers = [m for n, m in model.network.named_modules() if n.endswith(".to_q")]
    assert layers and all(m.weight.dtype == stored for m in layers)
    run(model, data, tmp_path / "run", "focusdpo", learning_rate=1e-5)
    assert {p.dtype for p in model.adapter_parameters()} == {torch.float32}
    assert any(value.abs().max() > 0 for name, value in policy(model).items() if "lora_B" in name)
    queries = [m.base_layer for n, m in model.network.named_modules() if n.endswith(".to_q")]
    assert all(m.weight.dtype == stored for m in queries)
    seen = []
    queries[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    with torch.no_grad():
        queries[0](torch.randn(1, 1, queries[0].in_features))  # as after a GPU's norms, which autocast runs in float32
    assert seen == [torch.bfloat16]


def test_a_quantized_base_without_a_gpu_or_without_bitsandbytes_says_what_to_do(tiny_flux, monkeypatch):
    if not torch.cuda.is_available():
        assert refusal(model=str(tiny_flux), weights="nf4").endswith(
            "(a quantized base needs a GPU): set backbone.weights to bfloat16 or float32"
        )
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    message = refusal(model=str(tiny_flux), weights="int8")
    assert message == "backbone.weights int8 needs bitsandbytes: install the extra [quantized]"


def test_float16_refuses_the_gradients_of_a_sum(prepared, tiny_flux, tmp_path):
    model = backbones.load(settings("flux_uno", tiny_flux, weights="float16", precision="float16"))
    training = params.section("training", TRAINING)
    with pytest.raises(TrainingError, match="float16 cannot hold the gradients of a sum"):
        train(model, prepared, tmp_path, objective=params.Objective(name="dpo", reduction="sum"), masks=params.Masks(),
              training=training)  # fmt: skip


def test_adamw_in_eight_bits_keeps_its_state_there(prepared, tiny_flux, tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    weight = torch.nn.Parameter(torch.randn(64, 128))  # bitsandbytes keeps tensors under 4096 elements in float32
    optimizer = new_optimizer([weight], params.Training(optimizer="adamw_8bit"))
    assert isinstance(optimizer, bnb.optim.AdamW8bit)
    weight.grad = torch.randn(64, 128)
    optimizer.step()
    assert optimizer.state[weight]["state1"].dtype == torch.uint8
    data = {1: prepared[1]}
    changes = {"optimizer": "adamw_8bit", "steps": 3, "lora": {"rank": 32}}
    whole = run(backbones.load(settings("flux_uno", tiny_flux)), data, tmp_path / "whole", "dpo", **changes)
    run(backbones.load(settings("flux_uno", tiny_flux)), data, tmp_path / "broken", "dpo", stop_after=2, **changes)
    resumed = run(backbones.load(settings("flux_uno", tiny_flux)), data, tmp_path / "broken", "dpo", **changes)
    assert all(torch.equal(value, policy(resumed)[name]) for name, value in policy(whole).items())


def test_adamw_in_eight_bits_needs_bitsandbytes(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.optim", None)
    with pytest.raises(TrainingError, match=r"needs bitsandbytes: install the extra \[quantized\]"):
        new_optimizer([torch.nn.Parameter(torch.zeros(1))], params.Training(optimizer="adamw_8bit"))


@pytest.mark.parametrize(
    ("backbone", "training", "expected"),
    [
        ({}, {}, "80gb.yaml"),
        ({"weights": "bfloat16"}, {}, "48gb.yaml"),
        ({"weights": "bfloat16"}, {"gradient_checkpointing": True}, "24gb.yaml"),
        ({"weights": "int8"}, {"gradient_checkpointing": True}, "24gb.yaml"),
        ({"weights": "nf4"}, {"gradient_checkpointing": True}, "lower training.batch_size"),
        ({"weights": "nf4"}, {"gradient_checkpointing": True, "batch_size": 1}, "no preset is smaller"),
        ({"weights": "bfloat16"}, None, "24gb.yaml"),
    ],
)
def test_too_little_memory_names_the_preset_that_needs_less(backbone, training, expected):
    backbone = params.Backbone(**backbone)
    training = None if training is None else params.Training(**training)
    assert expected in advice(backbone, training)
    with pytest.raises(MemoryShortageError, match="has too little memory to") as e, MemoryAdvice(backbone, training):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    assert expected in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(ZeroDivisionError), MemoryAdvice(backbone, training):
        _ = 1 / 0


# --- Settings ---


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"ip_adapter": "h94/IP-Adapter"}, "ip_adapter is a setting of sdxl_ip and means nothing to flux_uno"),
        ({"family": "sdxl_ip", "subject_lora": "x/y"}, "subject_lora is a setting of flux_uno and means nothing to"),
        ({"weights": "nf4", "precision": "float32"}, "weights in nf4 cannot compute in float32: leave precision at"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(values, expected):
    with pytest.raises(ParameterError, match=expected):
        params.section("backbone", values)


# --- The adapter's card ---


def test_the_card_of_an_adapter_says_how_it_was_made_and_loads_it(prepared, tiny_flux, tmp_path):
    model = run(backbones.load(settings("flux_uno", tiny_flux)), prepared, tmp_path, "focusdpo")
    use = params.Backbone(model="black-forest-labs/FLUX.1-dev", subject_lora="bytedance-research/UNO")
    objective, training = params.Objective(beta=300.0), params.Training(steps=3, learning_rate=1e-8)
    adapter_card.write(tmp_path / ADAPTER, tmp_path, use, objective, params.Masks(tau=0.2), training, "an H200")
    text = (tmp_path / ADAPTER / "README.md").read_text()
    front, body = text.split("---\n")[1:3]
    assert "base_model: black-forest-labs/FLUX.1-dev" in front and "- focusdpo" in front
    for words in (
        "LoRA of rank 32",
        "| beta | 300.0 |",
        "| learning_rate | 1e-08 |",
        "| tau | 0.2 |",
        "3 steps",
        "on an H200",
    ):
        assert words in body
    code = body.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    for words in ("'bytedance-research/UNO'", 'load_lora_weights("this/folder"', '["subject", "policy"]'):
        assert words in code
    assert model.part in body
    ours = params.Backbone(model=str(tiny_flux))
    adapter_card.write(tmp_path / ADAPTER, tmp_path, ours, objective, params.Masks(), training, "a CPU")
    local = (tmp_path / ADAPTER / "README.md").read_text()
    assert str(tiny_flux.parent) not in local and "base_model" not in local
    assert memory.PRESETS not in local


@pytest.mark.parametrize(
    ("cuda", "mps", "device"),
    [(True, False, "cuda"), (False, True, "mps"), (False, False, "cpu"), (True, True, "cuda")],
)
def test_models_run_on_the_best_device_there_is(cuda, mps, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert backbones.best_device() == device
