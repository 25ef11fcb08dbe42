"""`make data` against a server on this machine: nothing twice, nothing half, nothing other than its checksum says."""

import hashlib
import http.server
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from focusdpo_lib import params, stages
from focusdpo_lib.evaluation import dreambench
from focusdpo_lib.evaluation.benchmark import BenchmarkError
from focusdpo_lib.evaluation.dreambench import COMMIT, File, check_copy, fetch, manifest

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "dreambench"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the DreamBench photos are not beside the repository")
CONTENT = {"dataset/cat/00.jpg": bytes(range(256)) * 40, "dataset/cat/01.jpg": b"meow" * 500, "LICENSE.md": b"CC"}
FILES = [File(hashlib.sha256(data).hexdigest(), len(data), path) for path, data in CONTENT.items()]


class Server(http.server.ThreadingHTTPServer):
    """Serves `content`; of a path in `cut` only so many bytes of the answer; knows ranges if `ranges`."""

    def __init__(self, content):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.cut, self.ranges, self.asked = dict(content), {}, True, []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, path = self.server, self.path.lstrip("/")
        begin = int((self.headers.get("Range") or "bytes=0-")[6:-1]) if server.ranges else 0
        server.asked.append((path, begin))
        if path not in server.content:
            self.send_error(404)
            return
        body = server.content[path][begin:]
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: server.cut.get(path, len(body))])

    def log_message(self, *words):
        pass


@pytest.fixture
def server():
    with Server(CONTENT) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield found
        found.shutdown()


def held(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"
    }


def test_every_file_comes_once(server, tmp_path):
    assert fetch(tmp_path, FILES, server.url) == list(CONTENT)
    assert held(tmp_path) == CONTENT and len(server.asked) == 3
    assert fetch(tmp_path, FILES, server.url) == [] and len(server.asked) == 3
    (tmp_path / "dataset/cat/01.jpg").write_bytes(b"woof" * 500)  # damaged since: that one again
    assert fetch(tmp_path, FILES, server.url) == ["dataset/cat/01.jpg"] and held(tmp_path) == CONTENT


@pytest.mark.parametrize("ranges", [True, False])
def test_what_was_cut_off_goes_on_where_it_stopped(server, tmp_path, ranges):
    cat, server.ranges = "dataset/cat/00.jpg", ranges
    server.cut[cat] = 3000
    with pytest.raises(BenchmarkError, match=r"00.jpg: 3000 of 10240 bytes came\): run `make data` again"):
        fetch(tmp_path, FILES, server.url)
    assert not (tmp_path / cat).exists() and (tmp_path / "LICENSE.md").exists()
    server.cut.clear()
    assert fetch(tmp_path, FILES, server.url) == [cat] and held(tmp_path) == CONTENT
    assert server.asked[-1] == (cat, 3000 if ranges else 0)  # a server without ranges sends it whole


def test_all_that_has_another_checksum_or_is_not_there_is_named_at_once(server, tmp_path):
    server.content["dataset/cat/01.jpg"] = b"moew" * 500
    del server.content["LICENSE.md"]
    sentence = r"dataset/cat/01.jpg: its SHA-256 is not .*; LICENSE.md: the server answers 404 .*DREAMBENCH_DIR"
    with pytest.raises(BenchmarkError, match=sentence):
        fetch(tmp_path, FILES, server.url)
    assert held(tmp_path) == {"dataset/cat/00.jpg": CONTENT["dataset/cat/00.jpg"]}


@pytest.mark.parametrize("part", [b"other", b"x" * 2000, b"x" * 3000])
def test_a_part_of_something_else_is_fetched_anew(server, tmp_path, part):
    place = tmp_path / "dataset/cat/01.jpg.part"
    place.parent.mkdir(parents=True)
    place.write_bytes(part)
    fetch(tmp_path, FILES, server.url)
    assert held(tmp_path) == CONTENT


def test_without_a_network_and_a_copy_the_error_says_both_ways(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(params.DREAMBENCH_DIR, raising=False)
    monkeypatch.setattr(dreambench, "fetch", lambda folder, files: fetch(folder, files, "http://127.0.0.1:9"))
    monkeypatch.setattr("sys.argv", ["dreambench", "--folder", str(tmp_path)])
    with pytest.raises(
        SystemExit, match=r"LICENSE.md: the server cannot be reached .*`make data` again, .*DREAMBENCH_DIR to"
    ):
        dreambench.main()
    with pytest.raises(BenchmarkError, match="`make data` fetches, or set DREAMBENCH_DIR to a copy"):
        stages.load_benchmark(tmp_path, params.Benchmark(folder=str(tmp_path / "dreambench")), "single")


def test_a_copy_stands_for_a_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.setenv(params.DREAMBENCH_DIR, str(tmp_path))
    assert params.Benchmark(folder="../data/dreambench").folder == str(tmp_path)
    assert params.Benchmark(folder="../data/mine").folder == "../data/mine" and params.Benchmark().folder == "toybox"


@needs_data
def test_the_manifest_is_the_dataset_s_and_a_copy_of_smaller_photos_will_do(tmp_path, monkeypatch):
    files = {file.path: file for file in manifest()}
    photos = sorted(path for path in files if path.endswith(".jpg"))
    assert photos == sorted(p.relative_to(DATA).as_posix() for p in DATA.glob("dataset/*/*.jpg")) and len(photos) == 158
    prompts = files["dataset/prompts_and_classes.txt"]
    assert prompts.sha256 == hashlib.sha256((DATA / prompts.path).read_bytes()).hexdigest()
    assert len(COMMIT) == 40 and "has the 158 photos; 0 of them are those of commit" in check_copy(DATA)
    monkeypatch.setenv(params.DREAMBENCH_DIR, str(DATA))
    command = [sys.executable, "-m", "focusdpo_lib.evaluation.dreambench", "--folder", str(tmp_path / "none")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "so nothing is fetched" in said and not (tmp_path / "none").exists()
