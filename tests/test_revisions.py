"""A results folder stands on one commit of every hub model, whatever the hub or the cache say later."""

import http.server
import json
import threading
from dataclasses import replace

import huggingface_hub
import pytest
import yaml
from test_backbone_loading import uno  # noqa: F401 (a fixture)
from tiny_fixtures import build_tiny_flux
from tiny_training import TRAINING, tiny_pairs

from focusdpo_lib import backbones, params, stages
from focusdpo_lib.dip.dataset import write_dataset
from focusdpo_lib.evaluation.benchmark import Benchmark
from focusdpo_lib.training import ADAPTER

FIRST, LATER = "0123456789abcdef0123456789abcdef01234567", "89abcdef0123456789abcdef0123456789abcdef"


class Cache:
    """The cache as huggingface_hub lays it out: snapshots by commit, and in refs/main the newest that was fetched."""

    def __init__(self, folder):
        self.folder = folder

    def add(self, name, commit):
        """A new snapshot of a model, as when something fetched "main" anew; returns its folder."""
        model = self.folder / f"models--{name.replace('/', '--')}"
        snapshot = model / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (model / "refs").mkdir(exist_ok=True)
        (model / "refs" / "main").write_text(commit)
        return snapshot


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.HF_HUB_CACHE", str(folder), raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return Cache(folder)


def test_the_first_run_pins_and_later_ones_follow(cache, tmp_path):
    cache.add("someone/lora", FIRST)
    use = params.Backbone(model="someone/tiny", revision="v1", subject_lora="someone/lora")
    at_first = use.model_copy(update={"subject_revision": FIRST})
    assert backbones.pinned(use, tmp_path / "results") == at_first
    assert backbones.pinned(at_first, tmp_path / "none") == at_first and not (tmp_path / "none").exists()
    cache.add("someone/lora", LATER)
    assert backbones.pinned(use, tmp_path / "results") == at_first
    assert backbones.pinned(use, tmp_path / "others").subject_revision == LATER


def test_what_is_no_hub_model_or_of_no_known_commit_stays_as_it_is(cache, tmp_path, monkeypatch):
    (tmp_path / "my" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for model in ("toybox", "my/model", str(tmp_path / "my" / "model"), "nobody/knows", "some--one/x"):
        use = params.Backbone(model=model)
        assert backbones.pinned(use, tmp_path / "results") == use
    assert not (tmp_path / "results").exists()


def test_a_model_that_was_never_fetched_is_pinned_to_the_hub_s_newest(cache, tmp_path, monkeypatch):
    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            body = json.dumps({"id": "someone/lora", "sha": FIRST}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *words):
            pass

    asked = []
    server = http.server.HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    use = params.Backbone(subject_lora="someone/lora")
    try:
        assert backbones.pinned(use, tmp_path).subject_revision == FIRST
        count = len(asked)
        assert count and backbones.pinned(use, tmp_path).subject_revision == FIRST
        assert len(asked) == count  # the second time nobody is asked
    finally:
        server.shutdown()


class Silent(http.server.BaseHTTPRequestHandler):
    """A server that hangs up."""

    def do_GET(self):
        pass

    def log_message(self, *words):
        pass


class Portal(Silent):
    """A captive portal: every page is its own."""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html>Log in</html>")


@pytest.mark.parametrize("answering", [None, Silent, Portal])
def test_a_hub_that_cannot_be_asked_leaves_the_settings_as_they_are(answering, cache, tmp_path, monkeypatch):
    server = answering and http.server.HTTPServer(("127.0.0.1", 0), answering)
    if server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port if server else 9}"
    )
    use = params.Backbone(subject_lora="someone/lora")
    try:
        assert backbones.pinned(use, tmp_path) == use
    finally:
        if server:
            server.shutdown()


def test_of_two_that_begin_together_the_first_decides(cache, tmp_path, monkeypatch):
    """Both find no pin and look up another commit each: what the first writes holds for both."""
    use = params.Backbone(model="someone/tiny")

    def meanwhile(source):
        monkeypatch.setattr("focusdpo_lib.backbones.revisions.newest", lambda source: FIRST)
        assert backbones.pinned(use, tmp_path).revision == FIRST
        return LATER

    monkeypatch.setattr("focusdpo_lib.backbones.revisions.newest", meanwhile)
    assert backbones.pinned(use, tmp_path).revision == FIRST


def test_every_stage_takes_what_the_results_are_pinned_to(cache, uno, tmp_path):  # noqa: F811 (the fixture)
    build_tiny_flux().save_pretrained(cache.add("someone/tiny", FIRST))
    (cache.add("someone/lora", FIRST) / "dit_lora.safetensors").write_bytes(uno.read_bytes())
    write_dataset(tmp_path / "pairs", {"train": tiny_pairs(4)})
    use = params.Backbone(model="someone/tiny", subject_lora="someone/lora", precision="float32")

    def train(name):
        training = params.section("training", TRAINING | {"steps": 1})
        objective = params.Objective(name="dpo")
        return stages.train_adapter(
            tmp_path / "results", name, tmp_path / "pairs", use, objective, params.Masks(), training
        )

    benchmark = Benchmark.load(stages.toybox_benchmark(tmp_path / "results"), "single")
    benchmark = replace(benchmark, cases=benchmark.cases[:1])
    first = train("first")
    cache.add("someone/tiny", LATER)  # of which nothing could be loaded: they are empty
    cache.add("someone/lora", LATER)
    assert train("first") == first
    for folder in (first, train("second")):
        kept = yaml.safe_load((folder / "params.yaml").read_text())["backbone"]
        assert (kept["revision"], kept["subject_revision"]) == (FIRST, FIRST)
        card = (folder / ADAPTER / "README.md").read_text()
        assert f"from_pretrained('someone/tiny', revision='{FIRST}', " in card
        assert f"load_lora_weights('someone/lora', revision='{FIRST}', adapter_name=" in card
    stages.generate_images(tmp_path / "results", "first", benchmark, use, params.Generation(steps=1), first)
    made = [
        *(tmp_path / "results").glob("prepared/*/params.yaml"),
        *(tmp_path / "results").glob("generation/*/*/params.yaml"),
    ]
    assert [yaml.safe_load(path.read_text())["backbone"]["revision"] for path in made] == [FIRST, FIRST]
