"""A protocol's name sets every switch, and a table says it first. Values are those of the published evaluation code."""

import pytest
from test_evaluation_scores import ENCODERS, ONE, folder, generated, values  # noqa: F401 (a fixture)
from test_evaluation_tables import GENERATION, frame, single

from focusdpo_lib import params
from focusdpo_lib.evaluation import captions, protocols, tables, uno_cases
from focusdpo_lib.evaluation.benchmark import Benchmark, BenchmarkError
from focusdpo_lib.evaluation.scores import check, score_images
from focusdpo_lib.params import ParameterError

SWITCHES = ("references", "subjects", "average", "clip_precision", "clip_text_weight", "clip_text_clamp")


@pytest.mark.parametrize(
    ("name", "switches"),
    [
        ("uno", ("all", "mean", "subject", "float32", 1.0, True)),
        ("patchdpo", ("all", "mean", "subject", "float32", 1.0, False)),  # its loop takes the cosine as it is
        ("mip_adapter", ("all", "mean", "subject", "float32", 2.5, True)),
        ("strict", ("unused", "both", "subject", "float32", 1.0, True)),
        ("custom", ("all", "both", "subject", "float32", 1.0, True)),
    ],
)
def test_a_name_sets_every_switch(name, switches):
    settings = params.section("evaluation", {"protocol": name})
    assert tuple(getattr(settings, switch) for switch in SWITCHES) == switches
    assert params.section("evaluation", settings.model_dump()) == settings  # as a finished run's record is read again


def test_a_switch_that_contradicts_the_name_is_an_error_that_lists_all():
    sentence = r"references = 'unused' \(it sets 'all'\), clip_text_weight = 2.5 \(it sets 1.0\) contradicts .*'uno'"
    with pytest.raises(ParameterError, match=sentence):
        params.section("evaluation", {"protocol": "uno", "references": "unused", "clip_text_weight": 2.5})
    assert params.section("evaluation", {"protocol": "uno", "references": "all"}).references == "all"
    assert params.section("evaluation", {"protocol": "uno", "subjects": "both"}).subjects == "both"  # a column more
    with pytest.raises(ParameterError, match=r"subjects = 'min' \(it sets 'mean'\)"):
        params.section("evaluation", {"protocol": "uno", "subjects": "min"})
    with pytest.raises(ParameterError, match=r"evaluation\.protocol = 'unno'"):
        params.section("evaluation", {"protocol": "unno"})


def test_what_a_protocol_does_not_take_is_said_at_once(folder):  # noqa: F811
    single_, multi = (Benchmark.load(folder, kind) for kind in ("single", "multi"))
    four = params.section("generation", {"images_per_prompt": 4})
    uno, mip, strict = (params.section("evaluation", {"protocol": name}) for name in ("uno", "mip_adapter", "strict"))
    with pytest.raises(BenchmarkError, match=r"'uno' does not fit .*1 image a prompt, and .*images_per_prompt is 4"):
        check(single_, uno, four)
    with pytest.raises(BenchmarkError, match=r"the benchmark 'multi' and this one is 'single'; it takes 1 image"):
        check(single_, mip, four)
    check(multi, mip, ONE)
    check(single_, strict, four)


def test_strict_scores_against_photos_that_the_model_has_not_seen(folder, tmp_path):  # noqa: F811
    strict = params.section("evaluation", {"protocol": "strict"})
    images = generated(tmp_path, _0000_0=60, _0001_0=60, _0002_0=90)  # each is its reference: cat/01 is 60, mug/00 90
    scores = score_images(Benchmark.load(folder, "single"), images, ENCODERS, strict, ONE)
    assert values(scores, "dino") == pytest.approx([0.5] * 3, abs=1e-6)  # the photos left are 60 degrees away


# --- captions ---


def said(rows, **settings) -> str:
    return tables.markdown(tables.table(rows, params.section("evaluation", {"bootstrap": 50} | settings)))


def test_a_table_says_its_protocol_first_and_all_else_that_its_numbers_depend_on():
    text = said({"uno": single([0.5, 0.7], protocol="strict")}, average="image", seed=7)
    first = second = text.split("\n\n")[1]
    assert first.startswith(
        "Protocol strict (against the photos alone that the model has not seen). Calibration: not run"
    )
    assert "scores of real photos). Mean [95 %" in second and "bootstrap of 50 draws (seed 7) over 2 subjects" in second
    assert "evaluation.references = all" in second and "evaluation.average = image." in second
    plain = said({"uno": single([0.5])}).split("\n\n")[1]
    assert plain.startswith(
        "Protocol custom (every switch by itself). Calibration: not run (there are no scores of real"
    )


# --- calibration ---

THEIRS = {"dino": "facebook/dino-vits16@0123 eps 1e-06", "clip": "ViT-B-32-quickgelu/openai@0123 fp32", "reader": None}


def photos(dino, clip, names=tuple(uno_cases.PHOTO), encoders=THEIRS):
    """Scores of real photos, of the first subject 0.1 below and of the second 0.1 above."""
    off = {names[0]: -0.1, names[1]: 0.1}
    rows = [
        (name, str(i), metric, name, value + off.get(name, 0))
        for metric, value in (("dino", dino), ("clip_i", clip))
        for i, name in enumerate(names)
    ]
    scores = frame(rows, generation=None)
    scores.attrs["protocol"]["encoders"] = encoders
    return {"photos": scores}


@pytest.mark.parametrize(
    ("of", "passed", "sentence"),
    [
        (
            (0.774, 0.885),
            True,
            "Calibration passed: real photos against each other have DINO 0.774 (published: 0.774) and",
        ),
        ((0.7785, 0.8805), True, "Calibration passed"),
        ((0.780, 0.885), False, "CALIBRATION FAILED, so no number here compares with a published one: real photos"),
        ((0.774, 0.8795), False, "have DINO 0.774 (published: 0.774) and CLIP-I 0.879 (published: 0.885)"),
        (
            (0.9, 0.9, tuple(uno_cases.PHOTO)[1:]),
            None,
            "Calibration: not run (the photos are not those of DreamBench's",
        ),
        (
            (0.9, 0.9, tuple(uno_cases.PHOTO), THEIRS | {"dino": "dino@0"}),
            None,
            "not run (the published anchors are of other",
        ),
        ((0.774, 0.885, tuple(uno_cases.PHOTO), THEIRS | {"dino": "dino@0"}), True, "Calibration passed"),
    ],
)
def test_real_photos_must_give_the_published_anchors_or_the_first_line_says_so(of, passed, sentence):
    result = tables.table(photos(*of), params.Evaluation(bootstrap=50))
    for page in (tables.markdown(result), tables.text(result)):
        assert sentence in " ".join(page.split("\n\n")[1].split())
    assert result.attrs["calibrated"] is passed


def test_of_two_subjects_each_subject_s_photos_count_once():
    rows = [
        (f"{a}+{b}", str(i), metric, name, value)
        for metric, value in (("dino", 0.774), ("clip_i", 0.885))
        for i, (a, b) in enumerate(uno_cases.PAIRS)
        for name in (a, b)
    ]
    low = [(*row[:4], row[4] - 0.06) if row[3] == "cat" else row for row in rows]  # the cat of several pairs
    scores = frame(low, kind="multi", generation=None)
    scores.attrs["protocol"]["encoders"] = THEIRS
    result = tables.table({"photos": scores}, params.Evaluation())
    assert "DINO 0.772 (published: 0.774)" in tables.markdown(result) and result.attrs["calibrated"]


def test_rows_of_two_protocols_do_not_share_a_table_and_all_differences_are_named():
    rows = {"uno": single([0.5], protocol="uno"), "omni": single([0.5], protocol="mip_adapter", clip_text_weight=2.5)}
    both = r"evaluation.clip_text_weight is 1.0 in the one and 2.5 in the other; evaluation.protocol is 'uno' .*'mip_ad"
    with pytest.raises(protocols.ProtocolError, match=rf"'uno' and 'omni' cannot stand in one table: {both}"):
        tables.table(rows, params.Evaluation())


def test_rows_of_other_systems_have_a_sampling_of_their_own_which_may_be_unknown():
    rows = {
        "uno": single([0.5, 0.7]),
        "OmniGen v1.5": single([0.4, 0.6], generation={"steps": 50, "guidance": 1.0}),
        "DreamO": single([0.4, 0.6], generation={"steps": "unknown", "guidance": 1.0}),
        "SSR": single([0.4, 0.6], generation="unknown"),
        "RC": single([0.4, 0.6], generation="unknown"),
        "copy": single([0.9, 0.9], generation=None),
    }
    text = said(rows)
    assert "UNO, OmniGen v1.5 and DreamO were sampled with guidance = 1.0." in text
    assert "UNO was sampled with steps = 20. OmniGen v1.5 was sampled with steps = 50. DreamO was sampled with" in text
    assert "DreamO was sampled with steps = unknown. How the images of SSR and RC were sampled is unknown." in text
    with pytest.raises(protocols.ProtocolError, match=r"'SSR' and 'SSR' .* generation is 'unknown' in the one and"):
        said({"SSR": [single([0.4], generation="unknown"), single([0.4])]})


@pytest.mark.parametrize(
    ("sampling", "sentences"),
    [
        ({"uno": GENERATION}, ["UNO was sampled with steps = 20, guidance = 1.0."]),
        ({"a": GENERATION, "b": GENERATION}, ["a and b were sampled with steps = 20, guidance = 1.0."]),
        (
            {"a": {"steps": 2}, "b": {"steps": 3}, "c": {"steps": 3}},
            ["a was sampled with steps = 2.", "b and c were sampled with steps = 3."],
        ),
        ({"a": "unknown"}, ["How the images of a were sampled is unknown."]),
        ({}, []),
    ],
)
def test_was_and_were_agree_with_whom_they_are_said_of(sampling, sentences):
    assert list(captions.sampled(sampling)) == sentences


def test_a_published_number_is_compared_where_protocol_and_encoders_are_the_published_ones():
    theirs = {"encoders.dino": "facebook/dino-vits16@abc eps 1e-06", "encoders.clip": "ViT-B-32-quickgelu/openai fp32"}
    flat = {"benchmark": "single 0123", "evaluation.protocol": "uno", **theirs}
    assert protocols.is_published(flat)
    assert protocols.is_published(flat | {"evaluation.protocol": "patchdpo"})  # as the paper's rows of IPAP
    for change in (
        {"evaluation.protocol": "strict"},
        {"evaluation.protocol": "custom"},
        {"benchmark": "multi 0", "evaluation.protocol": "patchdpo"},
        {"encoders.dino": "facebook/dino-vits8"},
        {"encoders.dino": "facebook/dino-vits16-plus"},
        {"encoders.clip": "clip@f56ffeef0b95 fp32"},
    ):
        assert not protocols.is_published(flat | change)
    assert protocols.is_published(flat | {"encoders.dino": "dino@0123"}, calibrated=True)  # their weights, in a folder
    assert not protocols.is_published(flat, calibrated=False)
