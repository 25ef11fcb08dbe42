"""The DIP dataset on disk: a folder of train.parquet, validation.parquet and test.parquet.

Every builder (toybox, paper scale) writes this schema and every later stage reads it. A row is one quadruplet
(c, x_r, x_0^w, x_0^l) with the prior of each subject; lists have one entry per subject, in the order of the prompt.
Rows are checked on writing and again on reading: a dataset that can be read can be trained on. The files carry the
features of Hugging Face `datasets`, so `load_dataset("parquet", data_files=...)` decodes their images too.
"""

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, chain
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from focusdpo_lib.dip.pair import REFERENCE_MASKS, DatasetError, Pair, defect, reference_defect
from focusdpo_lib.dip.rows import class_names, decode, encode, error, features
from focusdpo_lib.runs import atomic

SPLITS = ("train", "validation", "test")
ROWS_PER_GROUP = 64  # rows written, read and held in memory together
TOLERANCE = b"focusdpo_tolerance"  # in the schema's metadata: what the pairs were written with


def write_dataset(folder: str | Path, splits: Mapping[str, Iterable[Pair]], tolerance: int = 0) -> None:
    """Checks and writes every split, row by row as its iterable yields; a file appears whole or not at all.

    `tolerance` is what `defect` allows; the files say it to whoever reads them. Raises DatasetError at the first row
    with a defect, a repeated id or another split's name.
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
    schema = schema.with_metadata({**schema.metadata, TOLERANCE: str(tolerance).encode()})
    with pq.ParquetWriter(temporary, schema, write_page_checksum=True) as writer:
        for pair in chain([first], pairs):
            _check(pair, path, split, seen, tolerance, masked)
            rows.append(encode(pair))
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
    found = {name: Split(Path(folder) / f"{name}.parquet", tolerance) for name in splits}
    if check:
        for name, split in found.items():
            seen = set()
            for pair in split:
                _check(pair, split.path, name, seen, split.tolerance, split.has_reference_masks)
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
        self.path = path
        if not path.is_file():
            raise DatasetError(f"{path} does not exist: build the dataset first (notebook 01)")
        with _open(path) as file:
            missing = [name for name in features() if name not in file.schema_arrow.names]
            self.has_reference_masks = REFERENCE_MASKS not in missing
            self._classes = class_names(file.schema_arrow)
            written_with = int((file.schema_arrow.metadata or {}).get(TOLERANCE, b"0"))
            self.tolerance = max(tolerance, written_with)
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
        pair = decode(self._held[1][index - self._starts[group]], self.path, self._classes)
        if problem := defect(pair, self.tolerance) or reference_defect(pair, self.has_reference_masks):
            raise error(pair.id, self.path, problem)
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
    problem = defect(pair, tolerance) or reference_defect(pair, masked)
    if pair.split != split:
        problem = f"it says that it belongs to the split {pair.split!r}"
    if pair.id in seen:
        problem = "its id occurs twice"
    if problem:
        raise error(pair.id, path, problem)
    seen.add(pair.id)
