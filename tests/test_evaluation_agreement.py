"""Our scores beside the published evaluations, written anew from their description, on DreamBench's own photos.

The models are small and random but of the published classes: a DINO as timm has it (the original's code: CLS token of
a ViT whose LayerNorms have an eps of 1e-6) and OpenAI's CLIP as open_clip has it. Transforms are torchvision's.
"""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision import transforms
from transformers import ViTConfig, ViTModel

from focusdpo_lib import params
from focusdpo_lib.evaluation import tables
from focusdpo_lib.evaluation.benchmark import Benchmark
from focusdpo_lib.evaluation.embeddings import kept
from focusdpo_lib.evaluation.encoders import ClipEncoder, DinoEncoder, load_encoders
from focusdpo_lib.evaluation.scores import score_images

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "dreambench"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="the DreamBench photos are not beside the repository")
EXACT = 1e-6
SINGLE = {"backpack": 3, "cat": 2, "vase": 1}  # subjects of 6, 5 and 6 photos, and how many of their prompts
PAIRS = {"backpack_dog+bear_plushie": 2, "berry_bowl+can": 1, "cat+dog": 2}
WIDTH, LAYERS, HEADS = 48, 2, 3


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """DINO as transformers saves it, and CLIP in open_clip's layout, with OpenAI's activation."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": LAYERS}
    ViTModel(ViTConfig(**sizes, num_attention_heads=HEADS, image_size=224, patch_size=16)).save_pretrained(
        folder / "dino"
    )
    vision = {"image_size": 224, "layers": 2, "width": 64, "head_width": 16, "patch_size": 32}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 2}
    config = {"embed_dim": 32, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
    (folder / "clip").mkdir()
    (folder / "clip" / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    state = open_clip.model.CLIP(**config).state_dict()
    save_file(
        {key: value.contiguous() for key, value in state.items()}, folder / "clip" / "open_clip_model.safetensors"
    )
    return folder


# --- the published side: transforms, features, cosines ---


def timm_dino(folder, patch=16):
    """The same weights in timm's Vision Transformer, whose code and eps are the original DINO's."""
    theirs = ViTModel.from_pretrained(folder).state_dict()
    vit = timm.models.vision_transformer.VisionTransformer(
        img_size=224,
        patch_size=patch,
        embed_dim=WIDTH,
        depth=LAYERS,
        num_heads=HEADS,
        num_classes=0,
        global_pool="token",
    )
    names = {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
        "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    }
    state = {ours: theirs[name] for ours, name in names.items()}
    renamed = {key.removeprefix("encoder."): value for key, value in theirs.items()}
    for kind in ("weight", "bias"):
        state[f"norm.{kind}"] = theirs[f"layernorm.{kind}"]
        for i in range(LAYERS):
            layer = {key.split(f"layer.{i}." if f"layer.{i}." in key else f"layers.{i}.")[1]: value
                     for key, value in renamed.items() if f"layer.{i}." in key or f"layers.{i}." in key}  # fmt: skip
            block = {key: value for key, value in layer.items() if key.endswith(f".{kind}")}
            query, key, value = (
                _find(block, *names) for names in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"))
            )
            state[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat([query, key, value])
            state[f"blocks.{i}.attn.proj.{kind}"] = _find(block, "attention.output", "o_proj")
            state[f"blocks.{i}.norm1.{kind}"] = _find(block, "layernorm_before")
            state[f"blocks.{i}.norm2.{kind}"] = _find(block, "layernorm_after")
            state[f"blocks.{i}.mlp.fc1.{kind}"] = _find(block, "intermediate", "fc1")
            state[f"blocks.{i}.mlp.fc2.{kind}"] = next(
                v for k, v in block.items() if k.startswith("output") or "fc2" in k
            )
    vit.load_state_dict(state)
    assert {m.eps for m in vit.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-6}
    return vit.eval()


def _find(block, *parts):
    return next(value for key, value in block.items() if any(part in key for part in parts))


def published(resize, mean, std, crop=224):
    bicubic = transforms.InterpolationMode.BICUBIC
    steps = [transforms.Resize(resize, bicubic), transforms.CenterCrop(crop), transforms.ToTensor()]
    return transforms.Compose([*steps, transforms.Normalize(mean, std)])


OF_DINO = published(256, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
OF_CLIP = published(224, *OPENAI)


class Published:
    """Features of files and prompts as numpy rows, unit or not, one at a time."""

    def __init__(self, folder):
        self.dino = timm_dino(folder / "dino")
        self.clip, _ = open_clip.create_model_from_pretrained(f"local-dir:{folder / 'clip'}")
        self.tokens = open_clip.get_tokenizer("ViT-B-32-quickgelu")
        self.known = {}

    @torch.no_grad()
    def features(self, kind, what):
        if (kind, what) not in self.known:
            if kind == "text":
                row = self.clip.encode_text(self.tokens([what]))
            else:
                image = Image.open(what).convert("RGB")
                pixels = (OF_DINO if kind == "dino" else OF_CLIP)(image)[None]
                row = self.dino(pixels) if kind == "dino" else self.clip.encode_image(pixels)
            self.known[kind, what] = row[0].numpy()
        return self.known[kind, what]

    def cosine(self, kind, image, other, of=None):
        a, b = self.features(kind, image), self.features(of or kind, other)
        return float(np.sum(a / np.linalg.norm(a) * (b / np.linalg.norm(b))))


@pytest.fixture(scope="module")
def theirs(models):
    return Published(models)


def few(kind):
    """The first prompts of some units, of UNO's list."""
    benchmark = Benchmark.load(DATA, kind, "uno")
    counts = SINGLE if kind == "single" else PAIRS
    cases = [c for unit, n in counts.items() for c in [case for case in benchmark.cases if case.unit == unit][:n]]
    assert len(cases) == sum(counts.values())
    return replace(benchmark, cases=tuple(cases))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """An image for every case: photos of other subjects, cut and turned, of another size and shape."""
    folder, others = tmp_path_factory.mktemp("images"), sorted(DATA.glob("dataset/d*/0[01].jpg"))
    found = {}
    for kind in ("single", "multi"):
        (folder / kind).mkdir()
        for i, case in enumerate(few(kind).cases):
            photo = Image.open(others[i]).convert("RGB").rotate(7 * i).crop((0, 0, 400 + 10 * i, 512))
            photo.save(folder / kind / f"{case.id}_0.png")
            found[case] = folder / kind / f"{case.id}_0.png"
    return folder, found


KNOWN: dict[tuple, dict] = {}  # several tests compare with the same table


def encoders_of(models, evaluation):
    """Ours, whose vectors every table of this file shares."""
    return kept(load_encoders(evaluation), models / "kept")


def ours(models, drawn, kind, **settings):
    """{column: value} of our table."""
    if (key := (kind, *sorted(settings.items()))) in KNOWN:
        return KNOWN[key]
    use = {"dino": str(models / "dino"), "clip": str(models / "clip"), "reader": None, "bootstrap": 50} | settings
    evaluation = params.section("evaluation", use)
    encoders = encoders_of(models, evaluation)
    scores = score_images(few(kind), drawn[0] / kind, encoders, evaluation, params.Generation())
    result = tables.table({"uno": scores}, evaluation)
    KNOWN[key] = result.set_index("column")["value"].to_dict()
    return KNOWN[key]


# --- the published loops ---


def test_uno_of_one_subject(models, drawn, theirs):
    """Every image against all photos of its subject; mean per subject, then over subjects. CLIP-T is clamped at 0."""
    benchmark, by_subject = few("single"), {}
    for case in benchmark.cases:
        photos, image = benchmark.subjects[case.subjects[0]].photos, drawn[1][case]
        dino = sum(theirs.cosine("dino", image, photo) for photo in photos) / len(photos)
        clip = sum(theirs.cosine("clip", image, photo) for photo in photos) / len(photos)
        text = max(theirs.cosine("clip", image, case.prompt, "text"), 0)
        by_subject.setdefault(case.subjects[0], []).append((dino, clip, text))
    expected = np.mean([np.mean(rows, axis=0) for rows in by_subject.values()], axis=0)
    found = ours(models, drawn, "single", protocol="uno")
    np.testing.assert_allclose([found[c] for c in ("DINO", "CLIP-I", "CLIP-T")], expected, atol=EXACT, rtol=0)


def test_uno_of_two_subjects(models, drawn, theirs):
    """The whole image against all photos of the one and of the other; their mean; mean over pairs."""
    benchmark, by_pair = few("multi"), {}
    for case in benchmark.cases:
        image, scores = drawn[1][case], []
        for kind in ("dino", "clip"):
            of_each = []
            for name in case.subjects:
                cosines = [theirs.cosine(kind, image, photo) for photo in benchmark.subjects[name].photos]
                of_each.append(sum(cosines) / len(cosines))
            scores += [(of_each[0] + of_each[1]) / 2, min(of_each)]
        scores.append(max(theirs.cosine("clip", image, case.prompt, "text"), 0))
        by_pair.setdefault(case.unit, []).append(scores)
    expected = np.mean([np.mean(rows, axis=0) for rows in by_pair.values()], axis=0)
    found = ours(models, drawn, "multi", protocol="uno", subjects="both")
    columns = ("DINO (mean)", "DINO (min)", "CLIP-I (mean)", "CLIP-I (min)", "CLIP-T")
    np.testing.assert_allclose([found[c] for c in columns], expected, atol=EXACT, rtol=0)


def test_patchdpo(models, drawn, theirs):
    """A subject's images and photos as two matrices, whose product is averaged whole; the text cosine as it is."""
    benchmark, rows = few("single"), []
    for name in SINGLE:
        cases = [case for case in benchmark.cases if case.unit == name]
        of_subject = []
        for kind in ("dino", "clip"):
            images = np.stack([theirs.features(kind, drawn[1][case]) for case in cases])
            photos = np.stack([theirs.features(kind, photo) for photo in benchmark.subjects[name].photos])
            images /= np.sqrt((images**2).sum(1, keepdims=True))
            photos /= np.sqrt((photos**2).sum(1, keepdims=True))
            of_subject.append((images @ photos.T).mean())
        texts = [theirs.cosine("clip", drawn[1][case], case.prompt, "text") for case in cases]
        rows.append([*of_subject, np.mean(texts)])
    assert min(theirs.cosine("clip", drawn[1][case], case.prompt, "text") for case in benchmark.cases) < 0
    found = ours(models, drawn, "single", protocol="patchdpo")
    np.testing.assert_allclose(
        [found[c] for c in ("DINO", "CLIP-I", "CLIP-T")], np.mean(rows, axis=0), atol=EXACT, rtol=0
    )
    assert found["CLIP-T"] < ours(models, drawn, "single", protocol="uno")["CLIP-T"] - 1e-4  # which clamps


def test_mip_adapter(models, drawn, theirs):
    """Combination by combination: 2.5 · max(cosine, 0) with the prompt; photos of each entity; mean of the two."""
    benchmark, rows = few("multi"), []
    for unit in PAIRS:
        cases = [case for case in benchmark.cases if case.unit == unit]
        texts = [2.5 * max(theirs.cosine("clip", drawn[1][c], c.prompt, "text"), 0) for c in cases]
        of_pair = [np.mean(texts)]
        for kind in ("clip", "dino"):
            entities = []
            for name in cases[0].subjects:
                photos = benchmark.subjects[name].photos
                entities.append(np.mean([[theirs.cosine(kind, drawn[1][c], p) for p in photos] for c in cases]))
            of_pair.append(np.mean(entities))
        rows.append(of_pair)
    found = ours(models, drawn, "multi", protocol="mip_adapter")
    columns = ("CLIP-T", "CLIP-I (mean)", "DINO (mean)")
    np.testing.assert_allclose([found[c] for c in columns], np.mean(rows, axis=0), atol=EXACT, rtol=0)


@pytest.mark.parametrize("references", ["used", "unused"])
def test_the_photos_that_are_scored_against(models, drawn, theirs, references):
    """PatchDPO's second setting scores against the one that went in; the honest one against all but that."""
    benchmark, by_subject = few("single"), {}
    for case in benchmark.cases:
        cosines = []
        for photo in benchmark.subjects[case.subjects[0]].photos:
            if (photo == case.references[0]) == (references == "used"):
                cosines.append(theirs.cosine("dino", drawn[1][case], photo))
        by_subject.setdefault(case.unit, []).append(sum(cosines) / len(cosines))
    expected = sum(sum(v) / len(v) for v in by_subject.values()) / len(by_subject)
    found = ours(models, drawn, "single", references=references)
    assert found["DINO"] == pytest.approx(expected, abs=EXACT)
    assert abs(found["DINO"] - ours(models, drawn, "single")["DINO"]) > 1e-4


def test_every_image_alike(models, drawn, theirs):
    benchmark, cosines = few("single"), []
    for case in benchmark.cases:
        photos = benchmark.subjects[case.subjects[0]].photos
        cosines.append(np.mean([theirs.cosine("clip", drawn[1][case], photo) for photo in photos]))
    found = ours(models, drawn, "single", average="image")["CLIP-I"]
    assert found == pytest.approx(np.mean(cosines), abs=EXACT)
    assert abs(found - ours(models, drawn, "single")["CLIP-I"]) > 1e-5


# --- other encoders ---


def unit_rows(made):
    rows = torch.cat(made).double()
    return (rows / rows.norm(dim=-1, keepdim=True)).numpy()


PICTURES = ("backpack/00.jpg", "cat/01.jpg", "can/03.jpg")


def test_dino_s_of_patches_of_8(tmp_path):
    """ViT-S/8 is that of S/16 with 28 · 28 patches: the same transforms, the same eps."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": LAYERS}
    torch.manual_seed(1)
    ViTModel(ViTConfig(**sizes, num_attention_heads=HEADS, image_size=224, patch_size=8)).save_pretrained(tmp_path)
    theirs, photos = timm_dino(tmp_path, 8), [DATA / "dataset" / name for name in PICTURES]
    with torch.no_grad():
        expected = unit_rows([theirs(OF_DINO(Image.open(photo).convert("RGB"))[None]) for photo in photos])
    found = DinoEncoder(str(tmp_path)).images(photos)
    np.testing.assert_allclose(found, expected, atol=EXACT, rtol=0)


LARGE = {"layers": 3, "width": 96, "head_width": 24, "patch_size": 14}  # ViT-L/14's and H/14's, narrower and shallower
LARGE_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 48, "heads": 3, "layers": 2}


@pytest.mark.parametrize(
    ("vision", "more"),
    [
        ({"image_size": 224}, {"quick_gelu": True}),  # OpenAI's ViT-L/14
        ({"image_size": 336}, {"quick_gelu": True}),  # and that for 336 pixels
        ({"image_size": 224, "ls_init_value": 0.1}, {}),  # LAION's have another activation; some scale their layers
    ],
)
def test_a_larger_clip(tmp_path, vision, more):
    """By open_clip's own network and OpenAI's transform at the model's own size, one picture and prompt at a time."""
    torch.manual_seed(2)
    config = {"embed_dim": 40, **more, "vision_cfg": LARGE | vision, "text_cfg": LARGE_TEXT}
    network = open_clip.model.CLIP(**config).eval()
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    state = {key: value.contiguous() for key, value in network.state_dict().items()}
    save_file(state, tmp_path / "open_clip_model.safetensors")
    side, tokens = vision["image_size"], open_clip.get_tokenizer("ViT-L-14")
    photos, prompts = [DATA / "dataset" / name for name in PICTURES], ["a dog", "a red backpack on the beach"]
    transform = published(side, *OPENAI, crop=side)
    with torch.no_grad():
        expected = [network.encode_image(transform(Image.open(photo).convert("RGB"))[None]) for photo in photos]
        said = [network.encode_text(tokens([prompt])) for prompt in prompts]
    clip = ClipEncoder(str(tmp_path))
    np.testing.assert_allclose(clip.images(photos), unit_rows(expected), atol=EXACT, rtol=0)
    np.testing.assert_allclose(clip.texts(prompts), unit_rows(said), atol=EXACT, rtol=0)


# --- all of UNO's cases ---


@pytest.mark.parametrize("kind", ["single", "multi"])
def test_every_score_of_all_750_cases(models, theirs, tmp_path, kind):
    """UNO's list as it is published, each case's image one of 24 photos that are turned: every DINO and CLIP-I of every
    image and subject, every CLIP-T, and the table's means, each by plain loops over the list's own paths."""
    listed = json.loads((DATA.parent / "uno" / f"dreambench_{kind}ip.json").read_text())
    assert len(listed) == 750
    photos, turned, images = sorted(DATA.glob("dataset/*/*.jpg")), [], tmp_path / "images"
    images.mkdir()
    for i, photo in enumerate(photos[3::7][:24]):
        turned.append(tmp_path / f"turned{i}.png")
        Image.open(photo).convert("RGB").resize((260, 240 + i)).rotate(11 * i).save(turned[-1])
    shown = [turned[(5 * i + i // 24) % len(turned)] for i in range(len(listed))]
    for i, image in enumerate(shown):
        os.link(image, images / f"{i:04d}_0.png")
    expected, by_unit = {}, {}
    for i, (entry, image) in enumerate(zip(listed, shown, strict=True)):
        names = [Path(path).parent.name for path in entry["image_paths"]]
        line = []
        for metric in ("dino", "clip"):
            for name in names:
                against = [photo for photo in photos if photo.parent.name == name]
                value = sum(theirs.cosine(metric, image, photo) for photo in against) / len(against)
                expected[f"{i:04d}", {"clip": "clip_i"}.get(metric, metric), name] = value
                line.append(value)
        expected[f"{i:04d}", "clip_t", ""] = max(theirs.cosine("clip", image, entry["prompt"], "text"), 0)
        halves = np.mean(np.reshape(line, (2, -1)), axis=1)
        by_unit.setdefault("+".join(names), []).append([*halves, expected[f"{i:04d}", "clip_t", ""]])
    use = {"dino": str(models / "dino"), "clip": str(models / "clip"), "reader": None, "bootstrap": 50}
    evaluation = params.section("evaluation", {**use, "protocol": "uno"})
    encoders = encoders_of(models, evaluation)  # by content: 24 images, and not 750
    benchmark = Benchmark.load(DATA, kind, "uno")
    scores = score_images(benchmark, images, encoders, evaluation, params.Generation())
    found = {(row.case, row.metric, row.subject): row.value for row in scores.itertuples()}
    assert found.keys() == expected.keys() and len(found) == 750 * {"single": 3, "multi": 5}[kind]
    furthest = max(expected, key=lambda key: abs(found[key] - expected[key]))
    assert abs(found[furthest] - expected[furthest]) < EXACT, furthest
    assert np.std([value for key, value in expected.items() if key[1] == "dino"]) > 1e-3  # no two alike by the models
    result = tables.table({"uno": scores}, evaluation).set_index("column")["value"]
    means = np.mean([np.mean(rows, axis=0) for rows in by_unit.values()], axis=0)
    assert len(by_unit) == 30
    np.testing.assert_allclose(result.to_numpy()[:3], means, atol=EXACT, rtol=0)
