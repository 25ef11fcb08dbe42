"""Pairs in the formats of others, and back again.

| format | folder | what it can hold |
|---|---|---|
| `uno` | train.json, images/ | prompt, references, winner: UNO's list of training examples |
| `diffusion_dpo` | train.parquet | prompt, winner, loser: the columns of diffusers' script for Diffusion-DPO |
| `imagefolder` | train/metadata.jsonl, train/… | everything |

Pictures are PNG files throughout, so that what a format holds comes back to the pixel.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from focusdpo_lib import pictures
from focusdpo_lib.dip.pair import DatasetError, Pair
from focusdpo_lib.dip.rows import png
from focusdpo_lib.runs import atomic

METADATA = "metadata.jsonl"
ROWS_PER_GROUP = 64
HELD = {  # by format, the fields of a pair that come back
    "uno": ("prompt", "references", "win", "split"),
    "diffusion_dpo": ("prompt", "win", "lose", "split"),
    "imagefolder": tuple(Pair.__dataclass_fields__),
}
DPO_SCHEMA = pa.schema(
    {"jpg_0": pa.binary(), "jpg_1": pa.binary(), "label_0": pa.int64(), "label_1": pa.int64(), "caption": pa.string()}
)
ONE, SEVERAL = ("win", "lose"), ("references", "masks", "reference_masks")
TEXTS = ("subjects", "captions", "disrupted_captions", "identities")
NOTES = ("disruption", "provenance", "scores")


def export(pairs: Iterable[Pair], folder: Path, form: str) -> None:
    """Writes the pairs of one split or several to a folder, which appears whole. Raises RunError where it is there."""
    if form not in HELD:
        raise DatasetError(f"{form!r} is no format that pairs are exported to: choose from {', '.join(HELD)}")
    if Path(folder).exists():
        raise DatasetError(f"{folder} is there already: name another folder, or delete it")
    with atomic(folder) as partial:
        partial.mkdir()
        _WRITERS[form](pairs, partial)


def imported(folder: Path, form: str) -> Iterator[dict[str, Any]]:
    """The fields HELD of every pair that an export in this format wrote, in order within a split.

    Raises DatasetError for a list that is damaged, and PictureError for a picture.
    """
    yield from _READERS[form](Path(folder))


# --- UNO ---


def _write_uno(pairs: Iterable[Pair], folder: Path) -> None:
    (folder / "images").mkdir()
    lists: dict[str, list[dict]] = {}
    for pair in pairs:
        shown = [_save(image, folder, f"images/{pair.id}-{i}.png") for i, image in enumerate(pair.references)]
        target = _save(pair.win, folder, f"images/{pair.id}.png")
        entry = {"prompt": pair.prompt, "image_paths": shown, "image_tgt_path": target}
        lists.setdefault(pair.split, []).append(entry)
    for split, entries in lists.items():
        text = json.dumps(entries, indent=1, ensure_ascii=False)
        (folder / f"{split}.json").write_text(text + "\n", encoding="utf-8")


def _read_uno(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("*.json")):
        for entry in _json(path, path.read_text(encoding="utf-8")):
            shown = tuple(_picture(folder / name) for name in entry["image_paths"])
            yield {
                **{"prompt": entry["prompt"], "split": path.stem},
                **{"references": shown, "win": _picture(folder / entry["image_tgt_path"])},
            }


# --- Diffusion-DPO ---


def _write_dpo(pairs: Iterable[Pair], folder: Path) -> None:
    """The winner is jpg_0 where the pair's place is even, else jpg_1: who ignores the labels shall see it."""
    waiting: dict[str, list[dict]] = {}
    writers: dict[str, pq.ParquetWriter] = {}
    try:
        for place, pair in enumerate(pairs):
            if pair.split not in writers:
                writers[pair.split] = pq.ParquetWriter(folder / f"{pair.split}.parquet", DPO_SCHEMA)
            order = (pair.win, pair.lose) if place % 2 == 0 else (pair.lose, pair.win)
            row = dict(zip(("jpg_0", "jpg_1"), map(png, order), strict=True))
            labels = {"label_0": (place + 1) % 2, "label_1": place % 2}
            rows = waiting.setdefault(pair.split, [])
            rows.append(row | labels | {"caption": pair.prompt})
            if len(rows) == ROWS_PER_GROUP:
                writers[pair.split].write_table(pa.Table.from_pylist(rows, DPO_SCHEMA))
                rows.clear()
        for split, rows in waiting.items():
            if rows:
                writers[split].write_table(pa.Table.from_pylist(rows, DPO_SCHEMA))
    finally:
        for writer in writers.values():
            writer.close()


def _read_dpo(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("*.parquet")):
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(ROWS_PER_GROUP):
                for row in batch.to_pylist():
                    first, second = (np.array(pictures.read(row[name])) for name in ("jpg_0", "jpg_1"))
                    win, lose = (first, second) if row["label_0"] else (second, first)
                    yield {"prompt": row["caption"], "win": win, "lose": lose, "split": path.stem}


# --- imagefolder ---


def _write_imagefolder(pairs: Iterable[Pair], folder: Path) -> None:
    for pair in pairs:
        place = folder / pair.split
        place.mkdir(exist_ok=True)
        line: dict[str, Any] = {"id": pair.id, "prompt": pair.prompt}
        for name in ONE:
            line[f"{name}_file_name"] = _save(getattr(pair, name), place, f"{pair.id}.{name}.png")
        for name in SEVERAL:
            images = enumerate(getattr(pair, name))
            line[f"{name}_file_names"] = [_save(image, place, f"{pair.id}.{name}.{i}.png") for i, image in images]
        line |= {name: list(getattr(pair, name)) for name in TEXTS}
        line |= {name: json.dumps(getattr(pair, name), ensure_ascii=False) for name in NOTES}  # of no fixed columns
        with (place / METADATA).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _read_imagefolder(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob(f"*/{METADATA}")):
        place = path.parent
        with path.open(encoding="utf-8") as file:
            for text in file:
                line = _json(path, text)
                found = {"id": line["id"], "prompt": line["prompt"], "split": place.name}
                found |= {name: _picture(place / line[f"{name}_file_name"]) for name in ONE}
                for name in SEVERAL:
                    read = _picture if name == "references" else pictures.read_mask
                    found[name] = tuple(read(place / file_name) for file_name in line[f"{name}_file_names"])
                found |= {name: tuple(line[name]) for name in TEXTS}
                yield found | {name: json.loads(line[name]) for name in NOTES}


def _save(image: np.ndarray, folder: Path, name: str) -> str:
    (folder / name).write_bytes(png(image))
    return name


def _picture(path: Path) -> np.ndarray:
    return np.array(pictures.read(path))


def _json(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DatasetError(f"{path} is damaged ({error}): export the pairs anew") from None


_WRITERS: Mapping[str, Callable[[Iterable[Pair], Path], None]] = {
    "uno": _write_uno,
    "diffusion_dpo": _write_dpo,
    "imagefolder": _write_imagefolder,
}
_READERS: Mapping[str, Callable[[Path], Iterator[dict[str, Any]]]] = {
    "uno": _read_uno,
    "diffusion_dpo": _read_dpo,
    "imagefolder": _read_imagefolder,
}
