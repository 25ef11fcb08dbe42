"""The chain's bench: what it measures of a few pairs, and what its page says."""

from focusdpo_lib.bench import dip


def test_a_few_pairs_go_through_every_stage_and_the_page_says_how_fast(tmp_path):
    run = dip.work(10, tmp_path)
    assert list(run["stages"]) == [
        *("synthesis", "segmentation", "captioning", "disruption", "scoring"),
        *("curation", "dataset"),
    ]
    assert run["pairs"] == 10 and 0 < run["kept"] <= 10 and run["peak_bytes"] > 1e8
    sizes = [of["bytes"] for of in run["stages"].values() if "bytes" in of]
    assert sizes[:5] == sorted(sizes[:5])  # every stage adds
    assert all(of["seconds"] > 0 for of in run["stages"].values())
    run["stages"]["scoring"]["seconds"] = 0.25  # of 10 pairs
    machine = {"device": "a cpu", "git": None}
    text = dip.page({"runs": [run | {"pairs": 5}, run], "machine": machine})
    assert "| scoring | 40 | 25.0 |" in text
    assert "| 5 | " in text and f"| {run['peak_bytes'] / 1e6:.0f} |" in text
