"""The scoring bench computes what it says, on small models: equal scores, and no forward where a vector is known."""

from focusdpo_lib.bench import scoring

SMALL = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = {"image_size": 224, "layers": 1, "width": 32, "head_width": 16, "patch_size": 32}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}


def test_all_ways_give_the_same_scores_and_known_vectors_cost_no_forward(tmp_path):
    encoders = scoring.write_models(tmp_path, SMALL, VISION, TEXT)
    forwards = []
    encoders.dino.model.register_forward_hook(lambda model, given, out: forwards.append(len(out.last_hidden_state)))
    seconds, difference = scoring.measure(encoders, tmp_path, 2, 6)
    assert difference < 1e-6 and list(seconds) == ["first row", "second row", "first row again", "image by image"]
    # Ten photos and six images, six of another row, nothing the third time; then an image and five photos, six times.
    assert forwards == [1, 10, 6, 6, *[1, 5] * 6]
    said = scoring.page({"first row": 2.0, "image by image": 7.0}, difference, 6, 10)
    assert "| first row | 2.00 | 3.5 × |" in said and "6 images, 10 photos, 25 prompts" in said
