"""From a folder of real photos to a training: every stage, with whatever needs no published weights."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from caption_server import ANSWER, caption_server
from PIL import Image, ImageDraw
from tiny_inpainting import write_tiny_fill
from tiny_training import load_tiny, tiny_train

from focusdpo_lib import params
from focusdpo_lib.dip import sources
from focusdpo_lib.dip.captioning import Captioning
from focusdpo_lib.dip.dataset import read_dataset, write_dataset
from focusdpo_lib.dip.disruption import Disruption
from focusdpo_lib.dip.export import export, imported
from focusdpo_lib.dip.pairs import pair_of
from focusdpo_lib.dip.run import run_chain, stage_drafts
from focusdpo_lib.dip.scoring import Scoring
from focusdpo_lib.dip.segmentation import Segmentation
from focusdpo_lib.dip.sources import Source
from focusdpo_lib.training.loop import LOG
from focusdpo_lib.training.pairs import prepare

PHOTOS = Path(__file__).parents[2] / "shared" / "data" / "dreambench" / "dataset"
pytestmark = pytest.mark.skipif(not PHOTOS.is_dir(), reason=f"DreamBench's photos are not at {PHOTOS}")
SIDE = 64
# Subjects that were photographed on a ground of one colour.
PLAIN = {"red_cartoon": ("cartoon", range(4)), "dog6": ("dog", range(1, 4)), "pink_sunglasses": ("glasses", range(2))}


@pytest.fixture(scope="module")
def painter(tmp_path_factory):
    return write_tiny_fill(tmp_path_factory.mktemp("models") / "fill")


def on_plain_ground() -> list[dict]:
    """Every photo of those subjects as a winner, with another of the same subject as its reference."""
    lines = []
    for name, (word, numbers) in PLAIN.items():
        files = [str(PHOTOS / name / f"{number:02d}.jpg") for number in numbers]
        for win, reference in zip(files, files[1:] + files[:1], strict=True):
            prompt = f"a photo of a {word} before a wall"
            lines.append({"file_name": win, "prompt": prompt, "subjects": [word], "references": [reference]})
            lines[-1] |= {"identities": [name], "licence": "CC-BY-4.0", "id": f"{name}-{Path(win).stem}"}
    return lines


def with_drawn_masks(folder: Path) -> list[dict]:
    """A photo of two things, and the masks of both and of their references as a user would draw them."""

    def drawn(name: str, *box: int) -> str:
        picture = Image.new("L", (512, 512))
        ImageDraw.Draw(picture).ellipse(box, fill=255)
        picture.save(folder / name)
        return name

    return [
        {
            "file_name": str(PHOTOS / "vase" / f"0{number}.jpg"),
            "prompt": "a vase beside a bowl",
            "subjects": ["vase", "bowl"],
            "references": [str(PHOTOS / "vase" / "02.jpg"), str(PHOTOS / "berry_bowl" / "04.jpg")],
            "masks": [drawn("vase.png", 60, 140, 200, 480), drawn("bowl.png", 260, 380, 400, 470)],
            "reference_masks": [drawn("one.png", 100, 100, 400, 500), drawn("other.png", 50, 100, 450, 400)],
        }
        for number in (3, 5)
    ]


def chain(tmp_path, lines, server, painter, **masks):
    """The drafts of a list of photos after all stages, in the kit's own run."""
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    use = {
        "source": {"folder": str(tmp_path), "size": SIDE},
        "segmentation": {"tolerance": 30, "plain": 0.7, **masks},
        "captioning": {"base_url": server.address},
        "disruption": {"model": str(painter), "weights": "float32", "steps": 2, "guidance": 2.0, "feather": 1},
        "scoring": {},
    }
    use = {name: params.section(name, values) for name, values in use.items()}
    made_by = [
        Source(use["source"]),
        Segmentation(use["segmentation"]),
        Captioning(use["captioning"], str(tmp_path / "answers")),
        Disruption(use["disruption"]),
        Scoring(use["scoring"]),
    ]
    run_chain(tmp_path / "chain", lambda: sources.plan(use["source"]), made_by, part_size=4, draft_bytes=10**5)
    return {stage.name: list(stage_drafts(tmp_path / "chain", stage.name)) for stage in made_by}


def trained_on(drafts, tmp_path, model, objective):
    """Ten steps on these drafts, written as the kit's dataset, exported, read back and prepared."""
    pairs = [pair_of(draft) for draft in drafts]
    write_dataset(tmp_path / "pairs", {"train": pairs})
    (split,) = read_dataset(tmp_path / "pairs", ["train"]).values()
    backbone = load_tiny(model)
    prepared = prepare(backbone, split, params.Masks())
    tiny_train(model, prepared, tmp_path / "training", objective, steps=10)
    return split, prepared, pd.read_csv(tmp_path / "training" / LOG)


def test_photos_on_plain_grounds_become_pairs_to_train_on(tmp_path, painter, tiny_flux):
    lines = on_plain_ground()
    with caption_server() as server:
        made = chain(tmp_path, lines, server, painter, masks="background", reference_masks="background")
        assert len(server.requests) == len(lines) == 9
        again = chain(tmp_path, lines, server, painter, masks="background", reference_masks="background")
        assert len(server.requests) == 9 and [d.id for d in again["scoring"]] == [d.id for d in made["scoring"]]
    drafts = made["scoring"]
    assert all(draft.scores["outside"] == 0 for draft in drafts)
    assert [draft.id for draft in drafts] == [line["id"] for line in lines] and not any(d.dropped for d in drafts)
    cartoon, dog = drafts[0], drafts[4]
    # The red figure on white is red, and what is not it is white; the dog on orange holds nothing orange at its edge.
    assert np.median(cartoon.win[cartoon.masks[0]], 0).tolist()[0] > 180
    assert (cartoon.win[~cartoon.masks[0]] > 225).all() and 0.15 < cartoon.masks[0].mean() < 0.3
    assert np.median(dog.win[~dog.masks[0]], 0).tolist()[2] < 80 and 0.3 < dog.masks[0].mean() < 0.5
    assert cartoon.captions == (ANSWER["caption"].replace("{subject}", "cartoon"),)
    # What the loser changes, it changes in the mask.
    for draft in drafts:
        changed = (draft.win != draft.lose).any(-1)
        assert changed.any() and not (changed & ~draft.masks[0]).any()


def test_photos_with_drawn_masks_become_pairs_of_two_subjects(tmp_path, painter):
    with caption_server() as server:
        lines = with_drawn_masks(tmp_path)
        made = chain(tmp_path, lines, server, painter, masks="files", reference_masks="files")
    for draft in made["scoring"]:
        assert not draft.dropped and len(draft.masks) == len(draft.reference_masks) == len(draft.captions) == 2
        assert abs(draft.masks[0].mean() - np.pi / 4 * 140 * 340 / 512**2) < 0.01  # an ellipse's area
        assert not (draft.masks[0] & draft.masks[1]).any()


def test_a_training_goes_on_what_the_chain_made_and_an_export_brings_it_back(tmp_path, painter, tiny_flux):
    with caption_server() as server:
        (tmp_path / "one").mkdir(), (tmp_path / "two").mkdir()
        one = chain(tmp_path / "one", on_plain_ground(), server, painter, masks="background")["scoring"]
        two = chain(tmp_path / "two", with_drawn_masks(tmp_path / "two"), server, painter, masks="files",
                    reference_masks="files")["scoring"]  # fmt: skip
    split, prepared, log = trained_on([*one, *two], tmp_path, tiny_flux, "focusdpo")
    assert {count: len(part.ids) for count, part in prepared.items()} == {1: 9, 2: 2}
    first = prepared[1]
    assert first.token_grid == (8, 8) and (first.prior_tokens.sum(-1) > 0).all()  # latent masks …
    cartoon = first.detail[0]  # … and entropy: none on white ground, much along the drawn lines
    assert cartoon[0, 0] < 1e-6 and 0.5 < cartoon.max() < 1 + 1e-6
    assert log["step"].unique().tolist() == list(range(10)) and np.isfinite(log["loss"]).all()
    export(split, tmp_path / "out", "imagefolder")
    for pair, back in zip(split, imported(tmp_path / "out", "imagefolder"), strict=True):
        assert back["id"] == pair.id and back["captions"] == pair.captions and back["disruption"] == pair.disruption
        for name in ("win", "lose", "references", "masks", "reference_masks"):
            assert np.array_equal(np.stack(back[name]), np.stack(getattr(pair, name)))
