"""Pages of a table's images: one file that needs nothing else, sorted and filtered by its own script in a browser."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from test_evaluation_layouts import MUG, write_benchmark

from focusdpo_lib.evaluation import pages
from focusdpo_lib.evaluation.benchmark import Benchmark
from focusdpo_lib.evaluation.scores import COLUMNS

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
EVIL = "</script><script>document.title='broken'</script>"
DINO = {"A": [0.5, 0.2, 0.9, 0.4, 0.6, 0.1], f"B{EVIL}": [0.4, 0.7, 0.8, 0.5, 0.1, 0.3]}


def row(label: str, values, benchmark: Benchmark, folder: Path) -> pages.Row:
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for n, (case, value) in enumerate(zip(benchmark.cases, values, strict=True)):
        noise = np.random.default_rng(n).integers(0, 255, (64, 64, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{case.id}_0.png")
        lines += [(case.id, 0, case.unit, case.prompt, "dino", name, value, 1.0) for name in case.subjects]
        lines.append((case.id, 0, case.unit, case.prompt, "clip_t", "", 0.3, 1.0))
        lines.append((case.id, 0, case.unit, case.prompt, "leakage", case.subjects[0], value, float(n > 0)))
    return pages.Row(label, pd.DataFrame(lines, columns=list(COLUMNS)), folder)


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory) -> Benchmark:
    folder = write_benchmark(tmp_path_factory.mktemp("data"))
    path = folder / "cases_single.json"
    cases = json.loads(path.read_text("utf-8"))
    cases[5]["prompt"] = f"a red dog & {EVIL}"
    path.write_text(json.dumps(cases), "utf-8")
    return Benchmark.load(folder, "single")


@pytest.fixture(scope="module")
def page(benchmark, tmp_path_factory) -> Path:
    into = tmp_path_factory.mktemp("page")
    rows = [row(label, values, benchmark, into / f"row{n}") for n, (label, values) in enumerate(DINO.items())]
    (made,) = pages.write(into / "page.html", f"Table <1> {EVIL}", "Protocol & all", benchmark, rows)
    return made


class Seen(HTMLParser):
    """Tags, where their sources lead, and the cases in their order."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.links, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def order(text: str) -> list[str]:
    rows = re.findall(r'<tr (?![^>]*hidden)[^>]*data-n[^>]*>.*?<th scope="row">(\d{4})', text, re.DOTALL)
    return rows


def test_a_page_needs_nothing_beside_it_and_shows_every_case_worst_first(page):
    text = page.read_text("utf-8")
    seen = Seen(text)
    assert all(link.startswith("data:image/webp;base64,") for link in seen.links) and len(seen.links) == 2 * 6
    assert not re.findall(r"url\((?!data:)", text) and "http" not in text
    assert order(text) == ["0004", "0005", "0000", "0003", "0001", "0002"]  # by the last row's DINO
    assert seen.tags.count("script") == 2 and seen.text.count(EVIL) >= 3  # all of it text, none of it a tag


def test_numbers_on_the_page_are_the_scores(page):
    text = page.read_text("utf-8")
    assert re.findall(r"DINO (0\.\d{3})", text)[:4] == ["0.600", "0.100", "0.100", "0.300"]
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    assert data["values"]["A"]["DINO"] == [0.6, 0.1, 0.5, 0.4, 0.2, 0.9]
    assert data["values"]["A"]["leakage rate"][2] is None and "leakage rate –" in text  # nothing could leak


def test_of_two_subjects_mean_and_minimum_are_scores_of_their_own(tmp_path, benchmark):
    multi = Benchmark.load(benchmark.folder, "multi")
    made = row("A", [0.5, 0.2, 0.9], multi, tmp_path / "row")
    second = made.scores[(made.scores["metric"] == "dino") & (made.scores["subject"] == "dog")].index
    made.scores.loc[second, "value"] -= 0.1
    found = pages.per_case(made.scores)
    assert found["DINO (mean)"].tolist() == pytest.approx([0.45, 0.15, 0.85])
    assert found["DINO (min)"].tolist() == pytest.approx([0.4, 0.1, 0.8])


@pytest.mark.parametrize(("budget", "files"), [(60_000, 1), (22_000, 2)])
def test_thumbnails_shrink_to_a_budget_and_then_the_cases_go_on_in_more_files(tmp_path, benchmark, budget, files):
    rows = [row(label, values, benchmark, tmp_path / "row") for label, values in DINO.items()]
    made = pages.write(tmp_path / "page.html", "t", "c", benchmark, rows, budget)
    assert (len(made) > 1) == (files > 1) and all(path.stat().st_size <= budget for path in made)
    worst_first = ["0004", "0005", "0000", "0003", "0001", "0002"]
    assert [case for path in made for case in order(path.read_text())] == worst_first
    if files > 1:
        assert made[1].name == "page-2.html" and 'href="page-2.html"' in made[0].read_text()


CHECKS = {
    "A's DINO": ({"row": "A"}, ["0005", "0001", "0003", "0000", "0004", "0002"]),
    "best first": ({"row": "A", "order": "best first"}, ["0002", "0004", "0000", "0003", "0001", "0005"]),
    "where A loses most to B": (
        {"row": "A", "minus": f"B{EVIL}"},  # −0.5 −0.2 −0.1 0.1 0.1 0.5
        ["0001", "0005", "0003", "0000", "0002", "0004"],
    ),
    "less is better, unknown last": (
        {"row": "A", "score": "leakage rate"},
        ["0002", "0004", "0003", "0001", "0005", "0000"],
    ),
    "a subject": ({"row": "A", "subject": MUG, "order": "as listed"}, ["0000", "0001", "0002"]),
    "a prompt": ({"row": "A", "contains": "BEACH"}, ["0001", "0004"]),
    "a kind": ({"row": "A", "prompt": "property change"}, ["0002"]),
}


@pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium to open the page in")
def test_a_browser_sorts_and_filters(page, tmp_path):
    """Each choice by an input event, as a reader's; what is then shown, in order."""
    script = """
    const said = {}, form_ = document.getElementById("controls");
    for (const [name, chosen] of Object.entries(CHECKS)) {
      form_.reset();
      for (const [field, value] of Object.entries(chosen)) form_.elements[field].value = value;
      form_.dispatchEvent(new Event("input"));
      said[name] = [...document.querySelectorAll("tbody tr")].filter(line => !line.hidden)
        .map(line => line.querySelector("th").textContent.slice(0, 4));
    }
    document.body.innerHTML = "";
    const shown = document.createElement("pre");
    shown.textContent = JSON.stringify({said, title: document.title});
    document.body.append(shown);
    """
    choices = json.dumps({name: chosen for name, (chosen, _) in CHECKS.items()}).replace("<", "\\u003c")
    copy = tmp_path / "copy.html"
    last = f"<script>const CHECKS = {choices};{script}</script></body>"
    copy.write_text(last.join(page.read_text("utf-8").rsplit("</body>", 1)), "utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    out = subprocess.run([*command, "--dump-dom", copy.as_uri()], capture_output=True, text=True, timeout=120).stdout
    parser = Seen(out)
    found = json.loads(parser.text[parser.text.index('{"said"') :].strip())
    assert found["title"] == f"Table <1> {EVIL}"
    assert found["said"] == {name: expected for name, (_, expected) in CHECKS.items()}


DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.mark.skipif(not DATA.is_dir(), reason="the DreamBench photos are not beside the repository")
def test_750_cases_of_six_rows_have_legible_thumbnails_in_one_file():
    """By the sample that decides: as many photos as there are images. Such a page was 16.3 MB (docs/inputs.md)."""
    photos = sorted((DATA / "dreambench" / "dataset").glob("*/*.jpg"))
    pictures = [photos[n % len(photos)] for n in range(750 * 6 + 30)]
    side, quality, files = pages._fitting(pictures, 750 * 7 * pages.LINE, pages.BUDGET)
    assert side >= 112 and quality >= 50 and files == 1
