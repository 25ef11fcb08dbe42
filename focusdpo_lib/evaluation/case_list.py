"""What was asked, as a plain table beside the images and the scores: a line an image, in cases.json and cases.parquet.

case, index (of the image within the case), prompt, subjects, classes (the words by which the prompt names them),
references (what went in), scoring (photos by subject that it is scored against; of scores only), seed (where it is
known). Files are told from the benchmark's folder on.

python -m focusdpo_lib.evaluation.case_list RUN --to uno|patchdpo --into FOLDER

lays the images of a run out as other systems write them, so that their evaluation scripts read them.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pandas as pd

from focusdpo_lib.evaluation.benchmark import Benchmark, BenchmarkError, Case
from focusdpo_lib.evaluation.scores import scoring_photos
from focusdpo_lib.runs import atomic, write_text

NAME = "cases"
FORMS = ("uno", "patchdpo")


def table(
    benchmark: Benchmark,
    count: int = 1,
    seed: Callable[[Case, int], int] | None = None,
    references: str | None = None,
) -> pd.DataFrame:
    """The table of `count` images a case. `references` ("all", "used", "unused") picks the photos scored against."""
    lines = []
    for case in benchmark.cases:
        line = {
            "prompt": case.prompt,
            "subjects": list(case.subjects),
            "classes": [benchmark.subjects[name].class_name for name in case.subjects],
            "references": [_from(benchmark, path) for path in case.references],
        }
        if references is not None:
            line["scoring"] = [
                [_from(benchmark, photo) for photo in scoring_photos(benchmark, name, reference, references)]
                for name, reference in zip(case.subjects, case.references, strict=False)  # all photos of one went in
            ]
        for index in range(count):
            lines.append({"case": case.id, "index": index, **line, "seed": seed and seed(case, index)})
    return pd.DataFrame(lines)


def write(folder: Path, cases: pd.DataFrame) -> None:
    """Both files, each whole or not at all."""
    text = json.dumps(cases.to_dict("records"), indent=1, ensure_ascii=False)
    write_text(Path(folder) / f"{NAME}.json", text + "\n")
    with atomic(Path(folder) / f"{NAME}.parquet") as partial:
        cases.to_parquet(partial, index=False)


def uno(cases: pd.DataFrame) -> list[dict]:
    """UNO's list: {"prompt", "image_paths"}, which its inference script reads, an entry a case.

    Beside them "text", "img_path1", "img_path2", the keys that its scoring scripts ask for and its own lists lack.
    """
    made = []
    for _, line in cases.drop_duplicates("case").iterrows():
        paths = [f"./dreambooth/{path}" for path in line["references"]]
        numbered = {f"img_path{number}": path for number, path in enumerate(paths, 1)}
        made.append({"prompt": line["prompt"], "image_paths": paths, "text": line["prompt"], **numbered})
    return made


def export(run: Path, into: Path, form: str) -> int:
    """Lays a run's images out anew; how many. "uno": <place in the list>_<index>.png and the list; "patchdpo":
    <subject>/<prompt>.png. Raises BenchmarkError where a form has no place for an image."""
    run, into = Path(run), Path(into)
    if form not in FORMS:
        raise BenchmarkError(f"'{form}' is no form of images: choose one of {', '.join(FORMS)}")
    cases = read(run)
    names = _uno_names(cases) if form == "uno" else _patchdpo_names(cases)
    if gone := [name for name in names if not (run / "images" / name).is_file()]:
        raise BenchmarkError(f"{run} lacks {len(gone)} of its images ({', '.join(gone[:10])}): make them again")
    with atomic(into) as partial:
        for source, name in names.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            _link(run / "images" / source, partial / name)
        if form == "uno":
            write_text(partial / "cases.json", json.dumps(uno(cases), indent=4, ensure_ascii=False) + "\n")
    return len(names)


def read(run: Path) -> pd.DataFrame:
    """The table that lies in a run's folder. Raises BenchmarkError where there is none."""
    path = Path(run) / f"{NAME}.json"
    try:
        return pd.DataFrame(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise BenchmarkError(
            f"{path} cannot be read ({type(error).__name__}): name a run of images of this kit"
        ) from None


def _uno_names(cases: pd.DataFrame) -> dict[str, str]:
    places = {case: place for place, case in enumerate(cases["case"].drop_duplicates())}
    return {_image(line): f"{places[line.case]}_{line.index_}.png" for line in _lines(cases)}


def _patchdpo_names(cases: pd.DataFrame) -> dict[str, str]:
    names: dict[str, str] = {}
    for line in _lines(cases):
        if len(line.subjects) > 1 or line.index_:
            raise BenchmarkError("PatchDPO's folders hold one image a prompt, of one subject: export these as uno")
        if any(sign in line.prompt for sign in "/.\0"):  # its script takes the name up to a dot for the prompt
            raise BenchmarkError(
                f"the prompt {line.prompt!r} is no file name that PatchDPO's script reads: export as uno"
            )
        names[_image(line)] = f"{line.subjects[0]}/{line.prompt}.png"
    if len(set(names.values())) < len(names):
        raise BenchmarkError("two cases have one subject and one prompt, which share a file in PatchDPO's folders")
    return names


def _lines(cases: pd.DataFrame):
    return cases.rename(columns={"index": "index_"}).itertuples(index=False)


def _image(line) -> str:
    return f"{line.case}_{line.index_}.png"


def _link(source: Path, made: Path) -> None:
    try:
        os.link(source.resolve(), made)
    except OSError:
        shutil.copyfile(source, made)


def _from(benchmark: Benchmark, path: Path) -> str:
    return Path(os.path.relpath(path, benchmark.folder)).as_posix()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m focusdpo_lib.evaluation.case_list", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", type=Path, help="results/generation/<kind>/<run>")
    parser.add_argument("--to", choices=FORMS, required=True)
    parser.add_argument("--into", type=Path, required=True, metavar="FOLDER")
    given: Mapping = vars(parser.parse_args())
    try:
        count = export(given["run"], given["into"], given["to"])
    except BenchmarkError as error:
        sys.exit(str(error))
    print(f"{given['into']} holds {count} images as {given['to']} writes them")


if __name__ == "__main__":
    main()
