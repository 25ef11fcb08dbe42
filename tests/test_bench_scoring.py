"""The scoring bench computes what it says, on small models: equal scores, and no forward where a vector is known."""

from focusdpo_lib.bench import scoring


def test_all_ways_give_the_same_scores_and_known_vectors_cost_no_forward(tmp_path):
    encoders = scoring.write_models(tmp_path, scoring.SMALL, scoring.SMALL_VISION, scoring.SMALL_TEXT)
    forwards = []
    encoders.dino.model.register_forward_hook(lambda model, given, out: forwards.append(len(out.last_hidden_state)))
    found = scoring.measure(encoders, tmp_path, 2, 6)
    anew = "in batches, anew for every row"
    assert list(found["seconds"]) == ["first row", "second row", "first row again", anew, "image by image"]
    assert found["difference"] < 1e-6 and all(value > 0 for value in found["parts"].values())
    # Ten photos and six images, six of another row, nothing the third time; ten photos and six images; then an image
    # and five photos, six times.
    assert forwards == [1, 16, 6, 10, 6, *[1, 5] * 6]


def test_the_page_says_what_is_met_and_what_is_missed(tmp_path):
    seconds = {"first row": 2.0, "second row": 1.5, "in batches, anew for every row": 1.9, "image by image": 7.0}
    found = {
        "seconds": seconds,
        "parts": {"decoding": 0.2, "preprocessing": 0.1, "forwards": 1.7},
        "memory": [scoring.work(3, tmp_path) | {"peak_bytes": 1_000_000}, {"images": 12, "peak_bytes": 1_040_000}],
        "machine": {"device": "a cpu", "git": None, "packages": {"torch": "2"}},
    }
    said = scoring.page(found | {"difference": 1e-7, "images": 6, "photos": 10, "threads": 1})
    assert "| first row | 2.00 | 3.5 × |" in said and "6 images and 10 photos" in said
    assert "| as fast as image by image, first row | ≥ 3 | 3.50 | met |" in said
    assert "| share of the encoders' forwards, first row | ≥ 90 % | 85.0% | missed |" in said
    assert "| seconds of a first row / of batches anew | < 1 | 1.05 | missed |" in said
    assert "| of two rows | < 1 | 0.92 | met |" in said
    assert "| memory of 4 times as many images | ≤ 1.05 | 1.04 | met |" in said and "| 3 | 1 |" in said
