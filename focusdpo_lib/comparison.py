"""What notebooks 04 and 05 compare on one benchmark: anchors, bases and adapters, each generated and scored once.

adapters (training runs) → images (generation runs) → scores → `evaluation.tables`
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from IPython.display import HTML
from matplotlib.figure import Figure
from PIL import Image

from focusdpo_lib import backbones, external, params, plots, runs, stages
from focusdpo_lib.evaluation import pages, scores, statistics, tables, whole, wins
from focusdpo_lib.evaluation.benchmark import Benchmark
from focusdpo_lib.evaluation.encoders import EncoderError, Encoders, to_pixels
from focusdpo_lib.evaluation.rows import OBJECTIVES, ROWS
from focusdpo_lib.evaluation.rows import family as family_of
from focusdpo_lib.evaluation.whole import Whole
from focusdpo_lib.generation import IMAGES, image_name
from focusdpo_lib.runs import Run, atomic
from focusdpo_lib.toybox.attributes import match
from focusdpo_lib.toybox.benchmark import render_case
from focusdpo_lib.toybox.world import ATTRIBUTES
from focusdpo_lib.training import LOG

ORACLE = "oracle"
TRAINED_WITH = ("backbone", "objective", "masks", "training")  # a training run's settings
EXTRAS = ("subject_lora", "ip_adapter")  # of a backbone, and inputs of its own


def adapters(results: Path, families: Mapping[str, params.FamilyRows]) -> tuple[dict[str, list[Path]], list[str]]:
    """The complete training runs of every row ("uno_sft"), one a seed, and a sentence for each that is not complete.

    Raises ParameterError where a run does not belong to its row, or a row's runs differ in more than their seeds.
    """
    found, missing = {}, []
    named = {f"{family}_{o}": names for family, rows in families.items() for o, names in rows.adapters}
    for row, name in ((row, name) for row, names in named.items() for name in names):
        folder = stages.place(results, "training", name)
        if runs.is_complete(folder):
            _check_run(folder, row, backbones.pinned(families[family_of(row)].backbone, results))
            found.setdefault(row, []).append(folder)
        else:
            missing.append(
                f"{ROWS[row]} stands here without {name}: {folder} holds no complete training run. "
                f"Run notebook 03 with 03_{row}.yaml of your profile's params and run this notebook again"
            )
    for row, folders in found.items():
        _check_seeds(folders, row)
    return found, missing


def trained(found: Mapping[str, Sequence[Path]]) -> dict[str, dict[str, str]]:
    """How the adapters of every row were trained, for `tables.table`: rate, β, reduction and steps, as set."""
    rows = {}
    for row, folders in found.items():
        settings = _params(folders[0])
        objective, training = settings["objective"], settings["training"]
        rows[row] = {"learning rate": f"{training['learning_rate']:g}", "steps": f"{training['steps']}"}
        if objective["name"] in ("dpo", "focusdpo"):
            rows[row] |= {"β": f"{objective['beta']:g}", "reduction": objective["reduction"]}
    return rows


def _check_run(folder: Path, row: str, backbone: params.Backbone) -> None:
    """ParameterError for a training run by another objective, family or base, whose row would bear the wrong name."""
    settings, objective = _params(folder), row.removeprefix(f"{family_of(row)}_")
    if (by := settings["objective"]["name"]) != objective:
        raise params.ParameterError(
            f"{folder} was trained by {by} and cannot be a row of {objective} ({ROWS[row]}): "
            f"name it under adapters.{by}"
        )
    if (trained := settings["backbone"]["family"]) != backbone.family:
        raise params.ParameterError(
            f"{folder} was trained on {trained} and cannot be a row of {backbone.family} ({ROWS[row]}): "
            "name it under its own family"
        )
    if (other := stages.other_base(folder, backbone)) is not None:
        raise params.ParameterError(f"{ROWS[row]} cannot stand here: {other}")


def _check_seeds(folders: Sequence[Path], row: str) -> None:
    """ParameterError for a row's training runs that are not one training from different seeds."""
    seeds: dict[int, Path] = {}
    for folder in folders:
        seed = _params(folder)["training"]["seed"]
        if seed in seeds:
            both = f"{seeds[seed].name} and {folder.name}"
            raise params.ParameterError(
                f"{ROWS[row]}: {both} are both of the training seed {seed}: name each seed once"
            )
        seeds[seed] = folder
    first = folders[0]
    for other in folders[1:]:
        found = [*runs.differences(_but_for_seed(first), _but_for_seed(other))]
        if found := [*found, *runs.changed(runs.inputs(first), runs.inputs(other))]:
            raise params.ParameterError(
                f"{ROWS[row]}: {first.name} (there) and {other.name} (here) differ in more than their seed "
                f"({'; '.join(found[:4])}): name runs of the same settings"
            )


def _but_for_seed(folder: Path) -> dict[str, Any]:
    """A training run's settings without its seed, and without what its inputs tell by content."""
    given = _params(folder)
    typed = {name: params.section(name, given[name], str(folder / runs.PARAMS)) for name in TRAINED_WITH}
    values = runs.plain(typed)  # with today's defaults, where an older kit did not have a setting yet
    values["training"].pop("seed")
    values["objective"].pop("patch_encoder")
    return values | {"backbone": {n: v for n, v in values["backbone"].items() if n not in ("model", *EXTRAS)}}


def oracle_images(results: Path, benchmark: Benchmark, prompts: int | None = None) -> Path:
    """The anchor `oracle`: every case rendered with the true identities, in the layout of a generation run."""
    benchmark = benchmark.first_prompts(prompts)
    settings = {"kind": benchmark.kind, "prompts": prompts}
    job = Run(runs.home(results) / "generation" / benchmark.kind / ORACLE, settings, {"benchmark": benchmark.hash})
    if not job.complete:
        with job:
            for case in benchmark.cases:
                with atomic(job.folder / IMAGES / image_name(case, 0)) as partial:
                    Image.fromarray(render_case(benchmark, case)).save(partial)
    return job.folder


def load_encoders(
    benchmark: Benchmark,
    evaluation: params.Evaluation,
    families: Mapping[str, params.FamilyRows],
    results: Path | None = None,
) -> Encoders:
    """The encoders of a table, before any image is made for it: what cannot be scored need not be sampled.

    Those of a hub are of the commits that `results` is pinned to.

    Raises EncoderError, and BenchmarkError where `evaluation` does not fit the cases or how they are sampled.
    """
    for rows in families.values():
        scores.check(benchmark, evaluation, rows.generation)
    found = stages.load_encoders(evaluation, results)
    for family, rows in families.items():
        if found.reader and benchmark.has_attributes and rows.generation.size != found.reader.size:
            raise EncoderError(
                f"generation.size = {rows.generation.size} of {family} is not accepted where evaluation.reader reads "
                f"the images, which takes {found.reader.size} pixels: set it to that, or evaluation.reader to null"
            )
    return found


def make_images(
    results: Path,
    benchmark: Benchmark,
    families: Mapping[str, params.FamilyRows],
    found: Mapping[str, Sequence[Path]],
    processes: int = 1,
) -> dict[str, list[Path]]:
    """Generation runs by row, one a training seed: the bases' and every adapter's; made where missing, in `processes`.

    With the oracle's, where the benchmark's attributes are known: only then can the true subjects be drawn.
    """
    folders = {ORACLE: [oracle_images(results, benchmark, prompts(families))]} if benchmark.has_attributes else {}
    for family, rows in families.items():
        how = benchmark, rows.backbone, rows.generation
        folders[family] = [stages.generate_images(results, family, *how, None, processes, rows.photos)]
        for row in (row for row in found if family_of(row) == family):
            folders[row] = [
                stages.generate_images(results, run.name, *how, run, processes, rows.photos) for run in found[row]
            ]
    return folders


def external_images(
    results: Path,
    benchmark: Benchmark,
    rows: params.External,
    families: Mapping[str, params.FamilyRows],
    taken: Sequence[str] = (),
) -> dict[str, list[Path]]:
    """Kept images by row, of rows that other systems made, beside the rows `taken`. Raises as `external.keep` does."""
    found = {}
    for given in rows.rows:
        external.check_name(given.row, taken)
        how = given.sampling.model_copy(update={"prompts": prompts(families)})
        found[given.row] = [external.keep(results, benchmark, given.model_copy(update={"sampling": how}))]
    return found


def sources(theirs: Mapping[str, Sequence[Path]]) -> dict[str, str]:
    """Where the rows of `external_images` come from, in words."""
    return {row: external.source(folders[0]) for row, folders in theirs.items()}


def prompts(families: Mapping[str, params.FamilyRows]) -> int | None:
    """How many prompts of every subject are taken (none: all), the same in all families of a table."""
    return next(rows.generation.prompts for rows in families.values())


def score_rows(
    results: Path,
    benchmark: Benchmark,
    folders: Mapping[str, Sequence[Path]],
    encoders: Encoders,
    evaluation: params.Evaluation,
    families: Mapping[str, params.FamilyRows],
    processes: int = 1,
) -> dict[str, list[pd.DataFrame]]:
    """Scores by row, one table a training seed, with the anchors `photos` and `copy`; what `tables.table` takes.

    So many processes encode the images.

    The anchor `photos` compares each subject's photos with each other: where one has a single photo, it is left out.
    """
    few = benchmark.first_prompts(prompts(families))
    rows = {}
    for row, made in folders.items():  # before the other anchors, so that their processes share the photos too
        if row == ORACLE:  # an anchor: no sampling settings stand behind it
            rows[row] = [scores.score_images(few, made[0] / IMAGES, encoders, evaluation, None)]
        elif not family_of(row):  # another system's
            how = encoders, evaluation, prompts(families), processes
            rows[row] = [external.score(results, benchmark, run, *how) for run in made]
        else:
            how = encoders, evaluation, families[family_of(row)].generation, processes
            rows[row] = [stages.score(results, run.name, benchmark, run, *how) for run in made]
    names = dict.fromkeys(name for case in few.cases for name in case.subjects)
    if single := [name for name in names if len(few.subjects[name].photos) < 2]:
        print(f"The anchor 'photos' is left out: there is one photo only of {', '.join(single)}.")
        of_photos = {}
    else:
        of_photos = {"photos": [scores.score_photos(few, encoders, evaluation)]}
    return {**of_photos, "copy": [scores.score_copy(few, encoders, evaluation)], **rows}


def attribute_table(
    benchmark: Benchmark,
    folders: Mapping[str, Sequence[Path]],
    encoders: Encoders,
    evaluation: params.Evaluation,
    families: Mapping[str, params.FamilyRows],
) -> pd.DataFrame:
    """Share of images with each attribute read right: row, attribute, value, low, high (95 %, as in the tables)."""
    few = benchmark.first_prompts(prompts(families))
    lines = []
    for row, made in folders.items():
        count = _images_per_prompt(row, made, families)
        read = [_read_attributes(few, run / IMAGES, encoders, count) for run in made]
        for name in ATTRIBUTES:
            values = statistics.units(read, name, evaluation.average)
            by = statistics.uncertainty(values, few.subjects_of, evaluation)
            found = statistics.estimate(values, by, statistics.SHARE)
            lines.append({"row": row, "attribute": name, **found._asdict()})
    return pd.DataFrame(lines)


def _images_per_prompt(row: str, made: Sequence[Path], families: Mapping[str, params.FamilyRows]) -> int:
    if row == ORACLE:
        return 1
    of = families[family_of(row)].generation if family_of(row) else external.sampled(made[0])
    return of.images_per_prompt


def _read_attributes(benchmark: Benchmark, images: Path, encoders: Encoders, count: int) -> pd.DataFrame:
    """Scores (a row an image, subject and attribute) of 1 where the reader sees the attribute, else 0."""
    keys = [(case, k) for case in benchmark.cases for k in range(count)]
    found = encoders.reader(to_pixels([images / image_name(case, k) for case, k in keys]))
    lines = []
    for (case, k), seen in zip(keys, found, strict=True):
        expected = [benchmark.subjects[name].attributes for name in case.subjects]
        for name, read, true in zip(case.subjects, match(seen, expected), expected, strict=True):
            for attribute in ATTRIBUTES:
                right = float(read is not None and read[attribute] == true[attribute])
                lines.append((case.id, k, case.unit, case.prompt, attribute, name, right, 1.0))
    return pd.DataFrame(lines, columns=list(scores.COLUMNS))


def shown(result: pd.DataFrame | Whole) -> HTML:
    """The table for a notebook; an interval may go below its mean, so that the eight columns of Table 2 fit a page."""
    style = ".fits :is(td, th) {white-space: normal !important; min-width: 5em; max-width: 9em}"
    text = whole.html(result) if isinstance(result, Whole) else tables.html(result)
    text = re.sub(r"\[(\S+), (\S+)\]", r"[\1,&nbsp;\2]", text)  # an interval stays in one piece
    return HTML(f'<style>{style}</style><div class="fits" style="overflow-x: auto">{text}</div>')


def where_rows_win(
    found: Mapping[str, Sequence[pd.DataFrame]], benchmark: Benchmark
) -> dict[str, tuple[pd.DataFrame, Figure]]:
    """FocusDPO against its base, by subject and kind of prompt, for every family whose rows were scored: by name, the
    table of `wins.compare` and its forest plot."""
    made = {}
    for row in (row for row in found if row.endswith("_focusdpo") and family_of(row) in found):
        table = wins.compare(found[row], found[family_of(row)], benchmark)
        made[f"wins_{family_of(row)}"] = table, plots.forest(table, ROWS[row], ROWS[family_of(row)])
    return made


def save_pages(
    results: Path,
    name: str,
    everything: Whole,
    benchmark: Benchmark,
    found: Mapping[str, Sequence[pd.DataFrame]],
    images: Mapping[str, Sequence[Path]],
) -> list[Path]:
    """Keeps pages of every image beside its references at results/pages/<name>, of each row's first training seed."""
    rows = [pages.Row(ROWS.get(row, row), found[row][0], made[0] / IMAGES) for row, made in images.items()]
    folder = stages.place(results, "pages", name)
    with atomic(folder) as partial:
        title = f"{tables.TITLES[benchmark.kind]}, image by image"
        written = pages.write(partial / "page.html", title, everything.caption, benchmark, rows)
    return [folder / path.name for path in written]


def save_table(
    results: Path,
    name: str,
    result: pd.DataFrame,
    figures: Mapping[str, Figure | None],
    inputs: Mapping[str, Path],
    everything: Whole | None = None,
    won: Mapping[str, tuple[pd.DataFrame, Figure]] | None = None,
) -> Path:
    """Keeps a table (text, Markdown, CSV) and its figures at results/tables/<name>, whole, in place of an older one.

    With the table of all rows (Markdown, LaTeX, CSV) and what `where_rows_win` found.
    """
    folder = stages.place(results, "tables", name)
    facts = {
        name: result.attrs[name] for name in ("protocol", "calibration", "sampling", "average", "bootstrap", "seed")
    }
    with atomic(folder) as partial, Run(partial, facts, inputs):
        for suffix, form in (("txt", tables.text), ("md", tables.markdown)):
            (partial / f"table.{suffix}").write_text(form(result), encoding="utf-8")
        result.to_csv(partial / "table.csv", index=False)
        if everything is not None:
            for suffix, form in (("md", whole.markdown), ("tex", whole.latex), ("csv", whole.csv)):
                (partial / f"all_rows.{suffix}").write_text(form(everything), encoding="utf-8")
        for title, (compared, _) in (won or {}).items():
            compared.to_csv(partial / f"{title}.csv", index=False)
        for title, figure in {**figures, **{title: drawn for title, (_, drawn) in (won or {}).items()}}.items():
            if figure is not None:
                figure.savefig(partial / f"{title}.png")
    return folder


def logs_beside(folder: Path) -> dict[str, pd.DataFrame]:
    """The step logs of a training run and of the complete runs beside it on its backbone and seed: {objective: log}."""
    own = _params(folder)
    found = {}
    beside = sorted(p for p in Path(folder).parent.iterdir() if runs.is_complete(p))
    for other in [folder, *(p for p in beside if _is_training(runs.settings(p)))]:
        there = _params(other)
        if (there["backbone"], there["training"]["seed"]) == (own["backbone"], own["training"]["seed"]):
            found.setdefault(there["objective"]["name"], pd.read_csv(other / LOG))
    return {name: found[name] for name in OBJECTIVES if name in found}


def _params(folder: Path) -> dict[str, dict[str, Any]]:
    """A training run's settings. ParameterError for a run of another stage."""
    settings = runs.settings(folder)
    if not _is_training(settings):
        raise params.ParameterError(f"{folder} is no training run: name one that notebook 03 made")
    return settings


def _is_training(settings: Mapping[str, Any]) -> bool:
    return settings.keys() >= set(TRAINED_WITH)


def order(result: pd.DataFrame, column: str, family: str) -> list[str]:
    """A family's base ("UNO") and what was trained from it, from the highest value of a column to the lowest."""
    rows = result[(result["column"] == column) & (result["family"] == family)]
    return rows.sort_values("value", ascending=False)["row"].tolist()
