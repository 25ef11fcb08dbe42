"""A pair as a row of parquet, and a row as a pair: the kit's own rows, and those that others wrote with `datasets`."""

import io
import json
import os
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image as PILImage

from focusdpo_lib import pictures
from focusdpo_lib.dip.pair import EXTRA, REFERENCE_MASKS, DatasetError, Pair

PICTURES = ("win", "lose", "references", "masks", REFERENCE_MASKS)  # columns
LONG = 255  # letters of a text that may be anything
Encoded = dict[int, tuple[np.ndarray, bytes]]  # by id(), arrays that were read and the PNG files that they were


@cache
def features(extra: bool = False):
    """The columns, in the words of Hugging Face `datasets` (which takes a second to import); `extra`: EXTRA as well."""
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
            **({"identities": List(Value("string")), "scores": Value("string")} if extra else {}),  # scores are JSON
        }
    )


def class_names(schema: pa.Schema, path: Path) -> dict[str, list[str]]:
    """The names behind the numbers of each column of class labels, or of lists of them, as `datasets` notes them."""
    try:
        noted = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    except ValueError as error:
        raise DatasetError(
            f"{path} describes its columns for `datasets` in what is no JSON ({error}): write it again, or drop its "
            "metadata 'huggingface'"
        ) from None
    for part in ("info", "features"):
        noted = noted.get(part) if isinstance(noted, dict) else None
    return {column: names for column, kind in (noted or {}).items() if (names := _names(kind))}


def _names(kind: Any) -> list[str]:
    """The names of a kind of column; of a list of labels `datasets` wrote [kind] or, since 4, {"feature": kind}."""
    if isinstance(kind, list) and len(kind) == 1:
        return _names(kind[0])
    if not isinstance(kind, dict):
        return []
    return kind["names"] if isinstance(kind.get("names"), list) else _names(kind.get("feature"))


def encode(pair: Pair, encoded: Encoded | None = None) -> dict[str, Any]:
    """A row in the words of `features`, EXTRA included. A picture that is in `encoded` is written as it was read."""

    def stored(image: np.ndarray) -> dict[str, Any]:
        return {"bytes": as_read(image, encoded or {}), "path": None}

    return {
        **{name: getattr(pair, name) for name in ("id", "prompt", "split")},
        **{name: list(getattr(pair, name)) for name in ("subjects", "captions", "disrupted_captions", "identities")},
        **{name: stored(getattr(pair, name)) for name in ("win", "lose")},
        **{name: list(map(stored, getattr(pair, name))) for name in ("references", "masks", REFERENCE_MASKS)},
        **{
            name: json.dumps(getattr(pair, name), ensure_ascii=False) for name in ("disruption", "provenance", "scores")
        },
    }


def as_read(image: np.ndarray, encoded: Encoded) -> bytes:
    """The PNG file that an image was, or a new one."""
    return encoded[id(image)][1] if id(image) in encoded else png(image)


def png(image: np.ndarray) -> bytes:
    """An image (H, W, 3) of uint8, or a mask (H, W) of bool as 0 and 255, as a PNG file."""
    buffer = io.BytesIO()
    PILImage.fromarray(image.astype(np.uint8) * 255 if image.dtype == bool else image).save(buffer, "PNG")
    return buffer.getvalue()


def decode(row: Mapping[str, Any], path: Path, classes: Mapping[str, list[str]]) -> Pair:
    """The pair of a row of the file `path`. Raises DatasetError that names the row, the column and what to do.

    Beside the kit's own rows it takes those whose meaning is as clear: pictures as bytes or as paths (to the file's
    folder or absolute), class labels, ids that are numbers, and one entry alone where a list is due.
    """
    reader = Row(row, path, classes)
    return Pair(
        **{name: reader.text(name) for name in ("id", "prompt", "split")},
        **{name: reader.texts(name) for name in ("subjects", "captions", "disrupted_captions")},
        **{name: reader.picture(name, row[name]) for name in ("win", "lose")},
        references=reader.pictures("references"),
        **{name: reader.pictures(name, pictures.read_mask) for name in ("masks", REFERENCE_MASKS)},
        **{name: reader.notes(name) for name in ("disruption", "provenance")},
        **_extra(row),
    )


def _extra(row: Mapping[str, Any]) -> dict[str, Any]:
    """EXTRA where it is the kit's own: columns of these names that others wrote may mean anything, and are let be."""
    identities, scores = (row.get(name) for name in EXTRA)
    try:
        scores = json.loads(scores)
    except (TypeError, ValueError):
        scores = {}
    named = isinstance(identities, list) and all(isinstance(name, str) for name in identities)
    return {"identities": tuple(identities) if named else (), "scores": scores if isinstance(scores, dict) else {}}


def named_files(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The names of files that stand in rows in place of pictures."""
    stored = (_stored(value) for row in rows for name in PICTURES for value in _list(row.get(name)))
    return [name for name in stored if name and isinstance(name, str)]


def _stored(value: Any) -> Any:
    """A picture as its bytes or the name of its file. `datasets` stores {"bytes": …, "path": …}, either may be None."""
    return value.get("bytes") or value.get("path") if isinstance(value, dict) else value


def _list(value: Any) -> list:
    """A list, or what stands alone where one is due."""
    if isinstance(value, list):
        return value
    return [] if value is None else [value]


class Row:
    """A row of the file `path`, column by column; what cannot be used raises DatasetError."""

    def __init__(self, row: Mapping[str, Any], path: Path, classes: Mapping[str, list[str]]):
        self.row, self.path, self.classes = row, path, classes

    def refused(self, problem: str) -> DatasetError:
        return error(self.row["id"], self.path, problem)

    def text(self, name: str) -> str:
        return self._text(name, self.row[name])

    def texts(self, name: str) -> tuple[str, ...]:
        return tuple(self._text(name, value) for value in _list(self.row.get(name)))

    def _text(self, name: str, value: Any) -> str:
        if isinstance(value, int) and 0 <= value < len(self.classes.get(name, ())):
            return self.classes[name][value]
        if value is None or isinstance(value, str) or (isinstance(value, int) and name == "id"):
            return "" if value is None else str(value)
        raise self.refused(f"its {name} is a {type(value).__name__} where a text is due")

    def picture(self, name: str, value: Any, read=pictures.read) -> np.ndarray:
        stored = _stored(value)
        if stored and isinstance(stored, str):
            if len(stored) > LONG and not os.path.isfile(self.path.parent / stored):
                start = f"a text of {len(stored)} letters ({stored[:16]!r} …) that is no file's name"
                raise self.refused(f"its {name} is {start}: store the bytes of an image file, not base64, or its path")
            stored = self.path.parent / stored
        if not stored or not isinstance(stored, bytes | Path):
            found = "empty" if not stored else f"a {type(stored).__name__}"
            raise self.refused(f"its {name} is {found}: store the bytes of an image file, or its path")
        try:
            return np.array(read(stored, f"its {name}" + (f" ({stored})" if isinstance(stored, Path) else "")))
        except pictures.PictureError as defect:
            raise self.refused(str(defect)) from None

    def pictures(self, name: str, read=pictures.read) -> tuple[np.ndarray, ...]:
        return tuple(self.picture(f"{name}[{i}]", stored, read) for i, stored in enumerate(_list(self.row.get(name))))

    def notes(self, name: str) -> dict[str, Any]:
        value = self.row[name]
        try:
            return value if isinstance(value, dict) else json.loads(value or "{}")
        except (TypeError, ValueError):
            raise self.refused(f"its {name} is not JSON") from None


def error(identifier: Any, path: Path, problem: str) -> DatasetError:
    """The sentence for a row that cannot be used."""
    return DatasetError(f"pair {identifier!r} of {path}: {problem}; correct or drop it and build the dataset again")
