"""Drafts on disk: a part of a stage is one parquet file, the same to the byte whenever and wherever it is made."""

import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from focusdpo_lib import pictures
from focusdpo_lib.dip.chain import Draft
from focusdpo_lib.dip.rows import Encoded, Row, as_read
from focusdpo_lib.runs import RunError, atomic, plain

TEXT = ("id", "prompt", "split", "dropped_by", "dropped")
TEXTS = ("subjects", "identities", "captions", "disrupted_captions")
PICTURE = ("win", "lose")
PICTURES = ("references", "masks", "reference_masks")
NOTES = ("disruption", "scores", "provenance")  # JSON
SCHEMA = pa.schema(
    {
        **{name: pa.string() for name in (*TEXT, *NOTES)},
        **{name: pa.list_(pa.string()) for name in TEXTS},
        **{name: pa.binary() for name in PICTURE},  # PNG; none while there is none
        **{name: pa.list_(pa.binary()) for name in PICTURES},
        "signature": pa.binary(),
    }
)


def part(folder: str | Path, stage: str, number: int) -> Path:
    """The file of a stage's part number `number` in a run's folder."""
    return Path(folder) / stage / f"part-{number:05d}.parquet"


def parts(folder: str | Path, stage: str) -> list[Path]:
    """The parts of a stage that are there, in order."""
    return sorted((Path(folder) / stage).glob("part-*.parquet"))


def table(drafts: Sequence[Draft], encoded: Encoded | None = None) -> pa.Table:
    """Drafts as a part holds them. A picture that is in `encoded` is as it was read, and so is its file."""
    return pa.Table.from_pylist([_encode(draft, encoded or {}) for draft in drafts], SCHEMA)


def write(path: Path, rows: pa.Table) -> None:
    """Writes a part, whole or not at all."""
    with atomic(path) as partial:
        pq.write_table(rows, partial, write_page_checksum=True)


def read(path: Path, encoded: Encoded | None = None, only: Collection[str] | None = None) -> list[Draft]:
    """The drafts of a part, their pictures decoded (not to be written into), whose files `encoded` is told.

    `only`: ids of those that are wanted. Raises RunError where the file is damaged.
    """
    try:
        rows = pq.read_table(path, page_checksum_verification=True).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise RunError(f"{path} cannot be read ({str(error).splitlines()[0]}): delete it and run again") from None
    encoded = {} if encoded is None else encoded
    return [_decode(row, path, encoded) for row in rows if only is None or row["id"] in only]


def find(folder: str | Path, stage: str, ids: Sequence[str]) -> list[Draft]:
    """Some drafts of a stage, in the order of `ids`. Raises RunError for one that is not there."""
    found: dict[str, Draft] = {}
    for path in parts(folder, stage):
        if len(found) < len(set(ids)) and not set(ids).isdisjoint(column(path, "id")):
            found |= {draft.id: draft for draft in read(path, only=ids)}
    if lost := [name for name in ids if name not in found]:
        raise RunError(f"{folder} has no draft {lost[0]!r} of the stage {stage}: correct the id, or run that stage")
    return [found[name] for name in ids]


def length(path: Path) -> int:
    """How many drafts a part has."""
    return pq.read_metadata(path).num_rows


def column(path: Path, name: str) -> list:
    """One column of a part, without decoding what the others hold."""
    return pq.read_table(path, columns=[name])[name].to_pylist()


def rows(folder: str | Path, stage: str, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Some columns of all parts of a stage, in order, a row a draft; a part at a time in memory."""
    for path in parts(folder, stage):
        yield from pq.read_table(path, columns=list(names)).to_pylist()


def notes(text: str) -> dict[str, Any]:
    """What a column of NOTES holds."""
    return json.loads(text)


def _encode(draft: Draft, encoded: Encoded) -> dict[str, Any]:
    def picture(image: np.ndarray | None) -> bytes | None:
        return None if image is None else as_read(image, encoded)

    return {
        **{name: getattr(draft, name) for name in (*TEXT, "signature")},
        **{name: list(getattr(draft, name)) for name in TEXTS},
        **{name: json.dumps(plain(getattr(draft, name), name), ensure_ascii=False) for name in NOTES},
        **{name: picture(getattr(draft, name)) for name in PICTURE},
        **{name: [picture(image) for image in getattr(draft, name)] for name in PICTURES},
    }


def _decode(row: dict[str, Any], path: Path, encoded: Encoded) -> Draft:
    reader = Row(row, path, {})

    def picture(name: str, stored: bytes, read=pictures.read) -> np.ndarray:
        image = reader.picture(name, stored, read)
        image.setflags(write=False)
        encoded[id(image)] = image, stored  # held, so that no other array gets its id
        return image

    def several(name: str) -> tuple[np.ndarray, ...]:
        read = pictures.read if name == "references" else pictures.read_mask
        return tuple(picture(f"{name}[{i}]", stored, read) for i, stored in enumerate(row[name]))

    return Draft(
        **{name: row[name] for name in (*TEXT, "signature")},
        **{name: tuple(row[name]) for name in TEXTS},
        **{name: reader.notes(name) for name in NOTES},
        **{name: None if row[name] is None else picture(name, row[name]) for name in PICTURE},
        **{name: several(name) for name in PICTURES},
    )
