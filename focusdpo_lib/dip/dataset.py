"""The DIP dataset on disk: a folder of train.parquet, validation.parquet and test.parquet.

Every builder (toybox, paper scale) writes this schema and every later stage reads it. A row is one quadruplet
(c, x_r, x_0^w, x_0^l) with the prior of each subject; lists have one entry per subject, in the order of the prompt.
Rows are checked on writing and again on reading: a dataset that can be read can be trained on. The files carry the
features of Hugging Face `datasets`, so `load_dataset("parquet", data_files=...)` decodes their images too.
"""

import io
import json
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image as PILImage

from focusdpo_lib.runs import atomic

SPLITS = ("train", "validation", "test")
ROWS_PER_GROUP = 64  # rows written, read and held in memory together
_PER_SUBJECT = ("references", "masks", "captions", "disrupted_captions")
REFERENCE_MASKS = "reference_masks"  # the one column that a dataset may lack: only masks.pool subject needs it


@cache
def features():
    """The columns, in the words of Hugging Face `datasets` (which takes a second to import)."""
    from datasets import Features, Image, List, Value

    return Features(
        {
            "id": Value("string"),
            "prompt": Value("string"),  # c
            "win": Image(),  # x_0^w
            "lose": Image(),  # x_0^l
            "references": List(Image()),  # x_r
            "masks": List(Image()),  # M_prior of each subject in the winner, 0 or 255
            REFERENCE_MASKS: List(Image()),  # where each reference shows its subject, 0 or 255
            "subjects": List(Value("string")),  # class words
            "captions": List(Value("string")),  # what the winner shows of each subject, in detail
            "disrupted_captions": List(Value("string")),  # what the loser shows instead
            "disruption": Value("string"),  # JSON: what changed, from what to what, and how strongly
            "provenance": Value("string"),  # JSON: generator, seed, and what else it takes to make the pair again
            "split": Value("string"),
        }
    )


class DatasetError(ValueError):
    """A DIP file or row that cannot be used; the message says which, what is wrong and what to do."""


@dataclass(frozen=True, eq=False)
class Pair:
    """One row, decoded. Images are uint8 (H, W, 3), references of any size; masks are bool (H, W).

    `reference_masks` are as large as the references, or none at all.
    """

    id: str
    prompt: str
    win: np.ndarray
    lose: np.ndarray
    references: tuple[np.ndarray, ...]
    masks: tuple[np.ndarray, ...]
    subjects: tuple[str, ...]
    captions: tuple[str, ...]
    disrupted_captions: tuple[str, ...]
    split: str
    reference_masks: tuple[np.ndarray, ...] = ()
    disruption: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def prior(self) -> np.ndarray:
        """M_prior of each subject, (S, H, W) bool."""
        return np.stack(self.masks)


def defect(pair: Pair, tolerance: int = 0) -> str | None:
    """The first thing that is wrong with a pair, in words, or None.

    `tolerance`: grey levels (of 255) by which win and lose may differ outside the masks; 0 where the loser is drawn, a
    few where an inpainting model's autoencoder has touched the whole image.
    """
    if not (pair.prompt or "").strip():
        return "its prompt is empty"
    if not pair.subjects:
        return "it names no subject"
    for name in _PER_SUBJECT:
        count = len(getattr(pair, name))
        if count != len(pair.subjects):
            return f"it has {len(pair.subjects)} subject(s) ({', '.join(pair.subjects)}) but {count} {name}"
    sizes = {"win": pair.win, "lose": pair.lose} | {f"mask {i}": mask for i, mask in enumerate(pair.masks)}
    sizes = {name: array.shape[:2] for name, array in sizes.items()}
    if len(set(sizes.values())) > 1:
        return "sizes differ: " + ", ".join(f"{name} is {w}×{h}" for name, (h, w) in sizes.items())
    for subject, mask in zip(pair.subjects, pair.masks, strict=True):
        if not mask.any():
            return f"the mask of its subject {subject!r} is empty"
    difference = np.abs(pair.win.astype(np.int16) - pair.lose).max(-1)
    inside = pair.prior.any(0)
    if (difference[~inside] > tolerance).any():
        n = int((difference[~inside] > tolerance).sum())
        most = int(difference[~inside].max())
        return f"win and lose differ outside the masks, at {n} pixel(s) by up to {most} levels ({tolerance} allowed)"
    if not (difference > tolerance).any():
        return "win and lose show the same image"
    return None


def _reference_defect(pair: Pair, masked: bool) -> str | None:
    """What is wrong with its reference masks, where the pairs of its file are `masked`."""
    if not masked and not pair.reference_masks:
        return None
    if len(pair.reference_masks) != len(pair.references):
        return f"it has {len(pair.references)} references but {len(pair.reference_masks)} {REFERENCE_MASKS}"
    for subject, mask, image in zip(pair.subjects, pair.reference_masks, pair.references, strict=True):
        if mask.shape != image.shape[:2]:
            (h, w), (high, wide) = mask.shape, image.shape[:2]
            return f"the reference mask of its subject {subject!r} is {w}×{h}, but the reference is {wide}×{high}"
        if not mask.any():
            return f"the reference mask of its subject {subject!r} is empty"
    return None


def write_dataset(folder: str | Path, splits: Mapping[str, Iterable[Pair]], tolerance: int = 0) -> None:
    """Checks and writes every split, row by row as its iterable yields; a file appears whole or not at all.

    Raises DatasetError at the first row with a defect, a repeated id or another split's name.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for split, pairs in splits.items():
        path = folder / f"{split}.parquet"
        with atomic(path) as temporary:
            _write_file(temporary, path, split, pairs, tolerance)


def _write_file(temporary: Path, path: Path, split: str, pairs: Iterable[Pair], tolerance: int) -> None:
    pairs = iter(pairs)
    first = next(pairs, None)
    if first is None:
        raise DatasetError(f"the {split} split for {path} has no pair: ask for at least one")
    schema, seen, rows = features().arrow_schema, set(), []
    masked = bool(first.reference_masks)  # all rows have them, or the file lacks the column
    if not masked:
        schema = schema.remove(schema.get_field_index(REFERENCE_MASKS))
    with pq.ParquetWriter(temporary, schema, write_page_checksum=True) as writer:
        for pair in chain([first], pairs):
            _check(pair, path, split, seen, tolerance, masked)
            rows.append(_encode(pair))
            if len(rows) == ROWS_PER_GROUP:
                writer.write_table(pa.Table.from_pylist(rows, schema))
                rows.clear()
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, schema))


def read_dataset(
    folder: str | Path, splits: Sequence[str] = SPLITS, *, check: bool = True, tolerance: int = 0
) -> dict[str, "Split"]:
    """The splits of a dataset folder, each a sequence of Pair that decodes a row when it is asked for.

    `check` reads every row once, so that a defect shows now and not in the middle of a training; without it a row is
    checked when it is decoded. Raises DatasetError: the file, the row's id, the defect and what to do.
    """
    found = {name: Split(Path(folder) / f"{name}.parquet", tolerance) for name in splits}
    if check:
        for name, split in found.items():
            seen = set()
            for pair in split:
                _check(pair, split.path, name, seen, tolerance, split.has_reference_masks)
    return found


def require_reference_masks(folder: str | Path, split: str = "train") -> None:
    """Raises DatasetError where a split has no masks of its references, which masks.pool subject needs (R20)."""
    path = Path(folder) / f"{split}.parquet"
    if not Split(path).has_reference_masks:
        raise DatasetError(
            f"{path} lacks the column {REFERENCE_MASKS}, which says where each reference shows its subject: add it, or "
            "set masks.pool to all"
        )


class Split(Sequence):
    """The pairs of one file. Holds one row group in memory: quick in order, at any size."""

    def __init__(self, path: Path, tolerance: int = 0):
        self.path, self.tolerance = path, tolerance
        if not path.is_file():
            raise DatasetError(f"{path} does not exist: build the dataset first (notebook 01)")
        with _open(path) as file:
            missing = [name for name in features() if name not in file.schema_arrow.names]
            self.has_reference_masks = REFERENCE_MASKS not in missing
            groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        missing = [name for name in missing if name != REFERENCE_MASKS]
        if missing:
            raise DatasetError(f"{path} lacks the column(s) {', '.join(missing)}: build it again with write_dataset")
        if not sum(groups):
            raise DatasetError(f"{path} holds no pair: build it again")
        self._starts = [0, *accumulate(groups)]
        self._held: tuple[int, list[dict]] = (-1, [])

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.path} has {len(self)} pairs, there is no pair {index}")
        index %= len(self)
        group = bisect_right(self._starts, index) - 1
        if self._held[0] != group:
            with _open(self.path) as file:
                self._held = (group, _rows(file, group, self.path))
        pair = _decode(self._held[1][index - self._starts[group]], self.path)
        if problem := defect(pair, self.tolerance) or _reference_defect(pair, self.has_reference_masks):
            raise _error(pair.id, self.path, problem)
        return pair


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError):
        raise DatasetError(f"{path} is not a whole parquet file: delete it and build the dataset again") from None


def _rows(file: pq.ParquetFile, group: int, path: Path) -> list[dict]:
    try:
        return file.read_row_group(
            group, columns=list(features())
        ).to_pylist()  # a column that is not there is left out
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{path} is damaged ({error}): delete it and build the dataset again") from None


def _check(pair: Pair, path: Path, split: str, seen: set[str], tolerance: int, masked: bool) -> None:
    problem = defect(pair, tolerance) or _reference_defect(pair, masked)
    if pair.split != split:
        problem = f"it says that it belongs to the split {pair.split!r}"
    if pair.id in seen:
        problem = "its id occurs twice"
    if problem:
        raise _error(pair.id, path, problem)
    seen.add(pair.id)


def _error(identifier: str, path: Path, problem: str) -> DatasetError:
    return DatasetError(f"pair {identifier!r} of {path}: {problem}; correct or drop it and build the dataset again")


def _encode(pair: Pair) -> dict[str, Any]:
    return {
        **{name: getattr(pair, name) for name in ("id", "prompt", "split")},
        **{name: list(getattr(pair, name)) for name in ("subjects", "captions", "disrupted_captions")},
        **{name: _png(getattr(pair, name)) for name in ("win", "lose")},
        "references": [_png(image) for image in pair.references],
        **{name: [_png(m.astype(np.uint8) * 255) for m in getattr(pair, name)] for name in ("masks", REFERENCE_MASKS)},
        **{name: json.dumps(getattr(pair, name), ensure_ascii=False) for name in ("disruption", "provenance")},
    }


def _png(image: np.ndarray) -> dict[str, Any]:
    buffer = io.BytesIO()
    PILImage.fromarray(image).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def _decode(row: dict[str, Any], path: Path) -> Pair:
    def image(name: str, stored: dict | None, mode: str = "RGB") -> np.ndarray:
        try:
            with PILImage.open(io.BytesIO(stored["bytes"])) as opened:
                return np.array(opened.convert(mode))
        except Exception as error:  # whatever a decoder trips over, the row cannot be used
            raise _error(row["id"], path, f"its image {name} cannot be decoded ({type(error).__name__})") from None

    def masks(name: str) -> tuple[np.ndarray, ...]:
        levels = [image(f"{name}[{i}]", stored, "L") for i, stored in enumerate(row.get(name) or ())]
        for i, mask in enumerate(levels):
            if not np.isin(mask, (0, 255)).all():
                raise _error(row["id"], path, f"its {name}[{i}] holds values other than 0 and 255")
        return tuple(mask > 0 for mask in levels)

    def notes(name: str) -> dict[str, Any]:
        try:
            return json.loads(row[name])
        except (TypeError, ValueError):
            raise _error(row["id"], path, f"its {name} is not JSON") from None

    return Pair(
        **{name: row[name] or "" for name in ("id", "prompt", "split")},
        **{name: tuple(row[name] or ()) for name in ("subjects", "captions", "disrupted_captions")},
        **{name: image(name, row[name]) for name in ("win", "lose")},
        references=tuple(image(f"references[{i}]", stored) for i, stored in enumerate(row["references"] or ())),
        **{name: masks(name) for name in ("masks", REFERENCE_MASKS)},
        **{name: notes(name) for name in ("disruption", "provenance")},
    )
