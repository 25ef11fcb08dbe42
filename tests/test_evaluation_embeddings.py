"""What was encoded once is not encoded again: by whom, when and under which name does not matter, content does."""

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from test_evaluation_scores import PROMPTS, folder, generated  # noqa: F401 (a fixture)
from tiny_models import write_tiny_models

from focusdpo_lib import params, stages
from focusdpo_lib.evaluation import embeddings
from focusdpo_lib.evaluation.benchmark import Benchmark, open_image
from focusdpo_lib.evaluation.embeddings import Kept, embed, kept, place_of
from focusdpo_lib.evaluation.encoders import Encoders, ahead


class Greys:
    """An encoder that counts: a grey of g is the direction of (g, 1), a text (its length, 0)."""

    id, batch_size, kind, device = "greys@1", 2, "dino", "cpu"

    def __init__(self):
        self.calls = []

    def images(self, pictures):
        return self.vectors(torch.stack([self.prepare(open_image(picture)) for picture in pictures]))

    def prepare(self, image):
        return torch.tensor([float(image.getpixel((0, 0))[0]), 1.0])

    def vectors(self, pixels):
        self.calls.append(pixels[:, 0].tolist())
        return pixels

    def texts(self, prompts):
        self.calls.append(list(prompts))
        return torch.tensor([[float(len(prompt)), 0.0] for prompt in prompts])


def grey(level):
    return Image.new("RGB", (4, 4), (level, level, level))


def saved(tmp_path, **levels):
    for name, level in levels.items():
        grey(level).save(tmp_path / f"{name}.png")
    return [tmp_path / f"{name}.png" for name in levels]


def test_a_content_is_encoded_once_whatever_its_name_and_whoever_asks(tmp_path):
    files = saved(tmp_path, a=10, b=20, c=10, d=30)
    one, other = (Kept(Greys(), tmp_path / "kept") for _ in range(2))
    assert one.images(files).tolist() == [[10, 1], [20, 1], [10, 1], [30, 1]]
    assert one.encoder.calls == [[10, 20], [30]]  # batches of its size; c is a
    shutil.copy(files[0], tmp_path / "again.png")
    assert other.images([tmp_path / "again.png", files[3]]).tolist() == [[10, 1], [30, 1]] and not other.encoder.calls
    grey(40).save(files[0])  # the same name, another content
    assert other.images([files[0], grey(50), grey(50)]).tolist() == [[40, 1], [50, 1], [50, 1]]
    assert other.encoder.calls == [[40, 50]]
    assert one.images([files[0], grey(50)]).tolist() == [[40, 1], [50, 1]] and one.encoder.calls == [[10, 20], [30]]


def test_words_are_no_pictures_and_encoders_share_nothing(tmp_path):
    one = Kept(Greys(), tmp_path / "kept")
    assert one.texts(["cat", "mouse", "cat"]).tolist() == [[3, 0], [5, 0], [3, 0]] and one.encoder.calls == [
        ["cat", "mouse"]
    ]
    assert one.texts(["mouse"]).tolist() == [[5, 0]] and len(one.encoder.calls) == 1
    places = {place_of(tmp_path, id) for id in ("a/b@1 fp32", "a-b@1 fp32", "a/b@2 fp32", "a/b@1 fp16")}
    assert len(places) == 4 and all(place.parent == tmp_path for place in places)


def test_a_damaged_file_counts_as_none(tmp_path):
    (file,) = saved(tmp_path, a=10)
    Kept(Greys(), tmp_path / "kept").images([file])
    (vectors,) = (tmp_path / "kept").glob("*.safetensors")
    vectors.write_bytes(vectors.read_bytes()[:40])
    again = Kept(Greys(), tmp_path / "kept")
    with pytest.warns(UserWarning, match="cannot be read .* made again"):
        assert again.images([file]).tolist() == [[10, 1]]
    assert Kept(Greys(), tmp_path / "kept").images([file]).tolist() == [[10, 1]]


def test_many_may_write_at_once(tmp_path):
    files = saved(tmp_path, **{f"p{i}": 5 * i for i in range(20)})
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: Kept(Greys(), tmp_path / "kept").images(files).tolist(), range(8)))
    assert all(vectors == [[5.0 * i, 1.0] for i in range(20)] for vectors in found)
    assert not [p for p in (tmp_path / "kept").iterdir() if p.suffix != ".safetensors"]


def test_shards_share_the_batches_of_one_call(tmp_path):
    files = saved(tmp_path, a=1, b=2, c=3, d=4, e=5, f=1)
    every = [Kept(Greys(), tmp_path / "kept") for _ in range(2)]
    todo = every[0].missing(files)
    assert todo == files[:5]
    for number, encoder in enumerate(every):
        embed([(encoder, encoder.batches(todo, (number, 2)))])
    assert [encoder.encoder.calls for encoder in every] == [[[1, 2], [5]], [[3, 4]]]
    assert every[0].missing(files) == []
    directions = every[0].images(files)
    assert (directions[:, 0] / directions[:, 1]).tolist() == pytest.approx([1, 2, 3, 4, 5, 1])


def test_encoders_side_by_side_open_a_file_once(tmp_path, monkeypatch):
    """A file that both lack is decoded for both, where it stands in the same batch of each."""
    files, opened = saved(tmp_path, a=1, b=2, c=3, d=4, e=5), []
    monkeypatch.setattr(embeddings, "open_image", lambda path: opened.append(path.stem) or open_image(path))
    one, other = Kept(Greys(), tmp_path / "one"), Kept(Greys(), tmp_path / "other")
    other.encoder.batch_size = 3
    embed([(one, one.batches(files)), (other, other.batches(files[1:]))])
    assert one.encoder.calls == [[1, 2], [3, 4], [5]] and other.encoder.calls == [[2, 3, 4], [5]]
    # lots: a b | b c d, then c d | e, then e: what a lot needs of another one is opened once more
    assert sorted(opened) == list("abccddee")
    assert one.missing(files) == other.missing(files[1:]) == [] and other.missing(files[:1]) == files[:1]


def test_an_encoder_of_unknown_weights_is_not_kept():
    loose, pinned = SimpleNamespace(id="facebook/dino-vits16"), SimpleNamespace(id="facebook/dino-vits16@0123")
    found = kept(Encoders(loose, pinned), "somewhere")
    assert found.dino is loose and isinstance(found.clip, Kept) and found.clip.id == pinned.id
    assert kept(found, "elsewhere", "passing").clip is found.clip


@pytest.mark.parametrize("processes", [1, 2])
def test_scoring_again_costs_no_forward(folder, tmp_path, monkeypatch, processes):  # noqa: F811
    """Real (tiny) models through their loaders: the second row's photos and prompts, and everything of a second run."""
    models = write_tiny_models(tmp_path / "models")
    evaluation = params.Evaluation(dino=str(models / "dino"), clip=str(models / "clip"), reader=None, batch_size=2)
    images = generated(tmp_path, _0000_0=30, _0001_0=60, _0002_0=90).parent
    of, here = (Benchmark.load(folder, "single"), images), []
    encoders = stages.load_encoders(evaluation)
    for encoder in (encoders.dino, encoders.clip):
        monkeypatch.setattr(encoder, "vectors", lambda p, of=encoder.vectors: here.append(len(p)) or of(p))
    first = stages.score(tmp_path, "a", *of, encoders, evaluation, params.Generation(), processes)
    assert bool(here) == (processes == 1)  # several processes share images and photos: this one encodes none
    encoders = stages.load_encoders(evaluation, tmp_path)
    calls = []
    for encoder in (encoders.dino.encoder, encoders.clip.encoder):
        encoder.model.register_forward_hook(lambda *_: calls.append("forward"))
        monkeypatch.setattr(encoder, "images", lambda pictures: calls.append("images"))
    monkeypatch.setattr(encoders.clip.encoder, "texts", lambda prompts: calls.append("texts"))
    again = stages.score(tmp_path, "b", *of, encoders, evaluation, params.Generation(), processes)
    assert not calls and len(first) == 9 and len(PROMPTS) > 2
    assert first["value"].tolist() == again["value"].tolist()


def test_the_next_batch_is_made_beside_the_one_in_use_and_no_further():
    """Waiting here for an item of the second batch would never end if it were made when it is asked for."""
    made, second = [], threading.Event()

    def make(item):
        made.append(item)
        if item == 3:
            second.set()
        return -item

    batches = ahead([[1, 2], [3], [4, 5]], make)
    assert next(batches) == [-1, -2] and second.wait(30)
    assert made == [1, 2, 3]  # nothing of the third, however long it takes
    assert list(batches) == [[-3], [-4, -5]] and list(ahead([], make)) == []
    broken = ahead([[0], [1], [2]], lambda item: 1 // item)
    with pytest.raises(ZeroDivisionError):
        next(broken)
