"""The DIP dataset on disk: a folder of train.parquet, validation.parquet and test.parquet.

Every builder (toybox, paper scale) writes this schema and every later stage reads it. A row is one quadruplet
(c, x_r, x_0^w, x_0^l) with the prior of each subject; lists have one entry per subject, in the order of the prompt.
Rows are checked on writing and again on reading: a dataset that can be read can be trained on. The files carry the
features of Hugging Face `datasets`, so `load_dataset("parquet", data_files=...)` decodes their images too. A split that
`datasets` cut into shards, there or in a folder `data`, is read as one.
"""

import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, chain
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from focusdpo_lib.dip.pair import EXTRA, REFERENCE_MASKS, DatasetError, Pair, defect, reference_defect
from focusdpo_lib.dip.rows import PICTURES, Encoded, class_names, decode, encode, error, features, named_files
from focusdpo_lib.runs import atomic

SPLITS = ("train", "validation", "test")
ROWS_PER_GROUP = 64  # rows written, read and held in memory together
SHARD = r"{}-(\d+)-of-(\d+)(?:-[0-9a-f]+)?\.parquet"  # of a split; older `datasets` add a hash
TOLERANCE = b"focusdpo_tolerance"  # in the schema's metadata: what the pairs were written with


def write_dataset(
    folder: str | Path,
    splits: Mapping[str, Iterable[Pair]],
    tolerance: int = 0,
    encoded: Encoded | None = None,
) -> None:
    """Checks and writes every split, row by row as its iterable yields; a file appears whole or not at all.

    `tolerance` is what `defect` allows; the files say it to whoever reads them. `encoded`: files that are known of the
    pictures of the pair that was yielded last. Raises DatasetError at the first row with a defect, a repeated id or
    another split's name.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for split, pairs in splits.items():
        path = folder / f"{split}.parquet"
        with atomic(path) as temporary:
            _write_file(temporary, path, split, pairs, tolerance, encoded)


def _write_file(
    temporary: Path, path: Path, split: str, pairs: Iterable[Pair], tolerance: int, encoded: Encoded | None
) -> None:
    pairs = iter(pairs)
    first = next(pairs, None)
    if first is None:
        raise DatasetError(f"the {split} split for {path} has no pair: ask for at least one")
    extra = any(getattr(first, name) for name in EXTRA)
    schema, seen, rows = features(extra).arrow_schema, set(), []
    masked = bool(first.reference_masks)  # all rows have them, or the file lacks the column
    if not masked:
        schema = schema.remove(schema.get_field_index(REFERENCE_MASKS))
    schema = schema.with_metadata({**schema.metadata, TOLERANCE: str(tolerance).encode()})
    with pq.ParquetWriter(temporary, schema, write_page_checksum=True) as writer:
        for pair in chain([first], pairs):
            _check(pair, path, split, seen, tolerance, masked)
            rows.append(encode(pair, encoded))
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
    checked when it is decoded. `tolerance` is what `defect` allows where the files themselves allow no more. Raises
    DatasetError: the file, the row's id, the defect and what to do.
    """
    found = {name: Split(split_files(folder, name), tolerance) for name in splits}
    if check:
        for name, split in found.items():
            seen: set[str] = set()
            for index, pair in enumerate(split):
                _check_place(pair, split.file_of(index), name, seen)
    return found


def split_files(folder: str | Path, split: str) -> tuple[Path, ...]:
    """The files of a split, in order: <split>.parquet, or its shards as `datasets` names them, there or in `data`.

    Raises DatasetError where there is none, where a shard is missing, and where there is more than one such set.
    """
    folder = Path(folder)
    sets = [[path] for path in [folder / f"{split}.parquet"] if path.is_file()]
    for place in (folder, folder / "data"):
        named = {p: re.fullmatch(SHARD.format(re.escape(split)), p.name) for p in place.glob(f"{split}-*.parquet")}
        shards = {path: (int(match[1]), int(match[2])) for path, match in named.items() if match}
        if shards:
            _check_shards(place, split, sorted(shards.values()))
            sets.append(sorted(shards, key=shards.get))
    if len(sets) > 1:
        there = " and ".join(str(files[0]) for files in sets)
        raise DatasetError(f"the {split} split lies twice in {folder}, at {there}: keep the one that is meant")
    if not sets and any((place / "state.json").is_file() for place in (folder, folder / split)):
        raise DatasetError(
            f"{folder} holds what save_to_disk wrote, in Arrow files: write each split with Dataset.to_parquet, "
            f"here as {split}.parquet"
        )
    if not sets:
        raise DatasetError(f"{folder / split}.parquet does not exist: build the dataset first (notebook 01)")
    return tuple(sets[0])


def _check_shards(place: Path, split: str, numbers: list[tuple[int, int]]) -> None:
    count = numbers[0][1]
    if numbers != [(number, count) for number in range(count)]:
        found = ", ".join(f"{number} of {of}" for number, of in numbers)
        raise DatasetError(
            f"the shards of the {split} split in {place} are not one whole set (there are {found}): fetch or write "
            "them again"
        )


def pictures_behind(folder: str | Path, split: str = "train") -> dict[str, Path]:
    """The files that a split's rows name where they could hold a picture, by the name that the row gives."""
    found: dict[str, Path] = {}
    for path in split_files(folder, split):
        with _open(path) as file:
            columns = [name for name in PICTURES if _may_name(file.metadata, name)]
            for group in range(file.num_row_groups if columns else 0):
                names = named_files(_rows(file, group, path, columns))
                found |= {name: path.parent / name for name in names}
    return found


def _may_name(metadata: pq.FileMetaData, column: str) -> bool:
    """Whether there is a text in a column of pictures: by the file's own counts, without reading it."""
    for at in range(metadata.num_columns):
        leaf = metadata.schema.column(at)
        if leaf.path.split(".")[0] == column and leaf.logical_type.type == "STRING":
            chunks = [metadata.row_group(group).column(at) for group in range(metadata.num_row_groups)]
            if any(c.statistics is None or c.statistics.null_count < c.num_values for c in chunks):
                return True
    return False


def require_reference_masks(folder: str | Path, split: str = "train") -> None:
    """Raises DatasetError where a split has no masks of its references, which masks.pool subject needs (R20)."""
    files = split_files(folder, split)
    if not Split(files).has_reference_masks:
        raise DatasetError(
            f"{files[0]} lacks the column {REFERENCE_MASKS}, which says where each reference shows its subject: add it,"
            " or set masks.pool to all"
        )


class Split(Sequence):
    """The pairs of a split's files, one after the other. Holds one row group in memory: quick in order, at any size."""

    def __init__(self, files: Sequence[Path], tolerance: int = 0):
        self.files, self.path = tuple(files), files[0]
        self.tolerance, self.has_reference_masks = tolerance, False
        self._classes: dict[Path, dict[str, list[str]]] = {}
        self._groups: list[tuple[Path, int]] = []
        counts = [count for path in self.files for count in self._look_at(path)]
        if not sum(counts):
            raise DatasetError(f"{self.path} holds no pair: build it again")
        self._starts = [0, *accumulate(counts)]
        self._held: tuple[int, list[dict]] = (-1, [])

    def _look_at(self, path: Path) -> list[int]:
        """Notes what a file says of its rows, and returns how many each of its groups has."""
        with _open(path) as file:
            missing = [name for name in features() if name not in file.schema_arrow.names]
            self._classes[path] = class_names(file.schema_arrow, path)
            self.tolerance = max(self.tolerance, _tolerance(file.schema_arrow, path))
            groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        self.has_reference_masks |= REFERENCE_MASKS not in missing
        missing = [name for name in missing if name != REFERENCE_MASKS]
        if missing:
            raise DatasetError(f"{path} lacks the column(s) {', '.join(missing)}: build it again with write_dataset")
        self._groups += [(path, group) for group in range(len(groups))]
        return groups

    def __len__(self) -> int:
        return self._starts[-1]

    def file_of(self, index: int) -> Path:
        """The file that holds a pair."""
        return self._groups[bisect_right(self._starts, index) - 1][0]

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.path} has {len(self)} pairs, there is no pair {index}")
        index %= len(self)
        at = bisect_right(self._starts, index) - 1
        path, group = self._groups[at]
        if self._held[0] != at:
            with _open(path) as file:
                self._held = (at, _rows(file, group, path))
        pair = decode(self._held[1][index - self._starts[at]], path, self._classes[path])
        if problem := defect(pair, self.tolerance) or reference_defect(pair, self.has_reference_masks):
            raise error(pair.id, path, problem)
        return pair


def _tolerance(schema: pa.Schema, path: Path) -> int:
    """The grey levels with which the file says that it was written; 0 where it does not say."""
    noted = (schema.metadata or {}).get(TOLERANCE, b"0")
    if not noted.isdigit():
        raise DatasetError(
            f"{path} says in its metadata that {TOLERANCE.decode()} is {noted.decode(errors='replace')!r}: write the "
            "whole number of grey levels there, or leave it out and set dip.tolerance"
        )
    return int(noted)


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError):
        raise DatasetError(f"{path} is not a whole parquet file: delete it and build the dataset again") from None


def _rows(file: pq.ParquetFile, group: int, path: Path, columns: Sequence[str] = ()) -> list[dict]:
    """The rows of a group, of some columns or of all that a pair has; a column that is not there is left out."""
    try:
        return file.read_row_group(group, columns=list(columns or features(extra=True))).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{path} is damaged ({error}): delete it and build the dataset again") from None


def _check(pair: Pair, path: Path, split: str, seen: set[str], tolerance: int, masked: bool) -> None:
    if problem := defect(pair, tolerance) or reference_defect(pair, masked):
        raise error(pair.id, path, problem)
    _check_place(pair, path, split, seen)


def _check_place(pair: Pair, path: Path, split: str, seen: set[str]) -> None:
    """Of a pair that is sound by itself: is it of this split, and here for the first time?"""
    if pair.split != split:
        raise error(pair.id, path, f"it says that it belongs to the split {pair.split!r}")
    if pair.id in seen:
        raise error(pair.id, path, "its id occurs twice")
    seen.add(pair.id)
