"""Where references and winners come from when nothing is to be drawn: own photos, Subjects200K, UNO-1M.

Each source is a plan (drafts without pictures, read from lists alone) and a stage in the place of synthesis, which
reads the pictures. Layouts are in docs/inputs.md. A picture without use and a prompt that does not name its subjects
drop the draft; a list that cannot be read ends the run before anything is made.

All pictures become squares of one size, for training takes no others: winners are cut around their centre, references
padded in the colour of their edge; the masks that come with them go the same way.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from focusdpo_lib import params, pictures
from focusdpo_lib.dip.chain import Draft, Maker, Unfit, one_by_one
from focusdpo_lib.dip.dataset import SPLITS
from focusdpo_lib.dip.mask_rules import edge_colour, edge_share
from focusdpo_lib.dip.models import StageError
from focusdpo_lib.dip.pairs import splits_by_identity
from focusdpo_lib.evaluation.wording import mentions, plain

NAME = "synthesis"  # whose place a source takes
METADATA = "metadata.jsonl"
NEEDED = ("file_name", "prompt", "subjects", "references")  # of a line of it
LISTS = ("subjects", "references", "identities", "masks", "reference_masks")
KNOWN = {*NEEDED, *LISTS, "id", "split", "licence"}
QUALITIES = ("compositeStructure", "objectConsistency", "imageQuality")  # of Subjects200K, 0 to 5
TOP_SCORE = 4.0  # of UNO-1M; a few rows hold what is no score


def plan(settings: params.Source) -> Iterable[Draft]:
    """The source's drafts, at most `limit` of them, in the order of its lists. Raises StageError."""
    folder = Path(settings.folder)
    if not folder.is_dir():
        raise StageError(f"the folder {folder} does not exist: correct source.folder")
    rows = islice(PLANS[settings.kind](settings, folder), settings.limit)
    drafts = list(rows)
    if not drafts:
        raise StageError(f"{folder} has no row that source's limits let through: loosen them, or correct source.folder")
    splits = splits_by_identity([draft.identities for draft in drafts], settings.splits.model_dump(), settings.seed)
    return [draft if draft.split else replace(draft, split=split) for draft, split in zip(drafts, splits, strict=True)]


@dataclass(frozen=True)
class Source:
    """The stage that reads the pictures of a plan's drafts."""

    settings: params.Source
    name: str = NAME

    def open(self) -> Maker:
        read = {"photos": _read_photos, "subjects200k": _Panels(), "uno_1m": _read_photos}[self.settings.kind]
        return one_by_one(NAME, lambda draft: _checked(read(self.settings, draft)))


def _checked(draft: Draft) -> Draft:
    if not all(mentions(draft.prompt, subject) for subject in draft.subjects):
        raise Unfit("its prompt does not name its subject")
    return draft


# --- a folder of photos ----------------------------------------------------------------------------------------------


def _plan_photos(settings: params.Source, folder: Path) -> Iterator[Draft]:
    path = folder / METADATA
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise StageError(f"{path} cannot be read ({error}): write it as UTF-8, a JSON object a line") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _photo_draft(_entry(line, f"line {number} of {path}"), number)


def _entry(line: str, where: str) -> dict[str, Any]:
    """A line of the list; raises StageError for one that says too little, or what nobody reads."""
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise StageError(f"{where} is no JSON ({error}): correct it") from None
    if not isinstance(entry, dict):
        raise StageError(f"{where} is no JSON object: write {{…}}")
    entry |= {name: [entry[name]] for name in LISTS if isinstance(entry.get(name), str)}
    if missing := [name for name in NEEDED if not entry.get(name)]:
        raise StageError(f"{where} lacks {', '.join(missing)}: add it")
    if unknown := sorted(entry.keys() - KNOWN):
        raise StageError(f"{where} has {', '.join(unknown)}, which nobody reads: correct the name, or leave it out")
    for name in entry.keys() & {*LISTS}:
        if not isinstance(entry[name], list) or not all(isinstance(item, str) and item for item in entry[name]):
            raise StageError(f"{name} in {where} is no list of texts: correct it")
        if len(entry[name]) != len(entry["subjects"]):
            raise StageError(f"{where} has {len(entry['subjects'])} subject(s) but {len(entry[name])} {name}")
    if odd := [name for name in entry.keys() - {*LISTS} if not isinstance(entry[name], str)]:
        raise StageError(f"{odd[0]} in {where} is no text: correct it")
    if entry.get("split", SPLITS[0]) not in SPLITS:
        raise StageError(f"split in {where} is {entry['split']!r}: write one of {', '.join(SPLITS)}, or leave it out")
    return entry


def _photo_draft(entry: Mapping[str, Any], number: int) -> Draft:
    files = {name: entry.get(name, []) for name in ("references", "masks", "reference_masks")}
    told = {"licence": entry["licence"]} if "licence" in entry else {}
    return Draft(
        id=entry.get("id", f"{number:06d}"),
        prompt=entry["prompt"],
        split=entry.get("split", ""),
        subjects=tuple(entry["subjects"]),
        identities=tuple(entry.get("identities", entry["references"])),
        provenance={NAME: {"source": METADATA, **told, "files": files | {"win": entry["file_name"]}}},
    )


def _read_photos(settings: params.Source, draft: Draft) -> Draft:
    files, folder = draft.provenance[NAME]["files"], Path(settings.folder)
    win = pictures.read(folder / files["win"])
    masks = [_mask(folder / name, win.size) for name in files["masks"]]
    references = [pictures.read(folder / name) for name in files["references"]]
    behind = [_mask(folder / n, r.size) for n, r in zip(files["reference_masks"], references, strict=False)]
    return replace(
        draft,
        win=_square(win, settings.size),
        masks=tuple(_square(mask, settings.size) > 0 for mask in masks),
        references=tuple(_padded(photo, settings.size) for photo in references),
        reference_masks=tuple(_padded(mask, settings.size) > 0 for mask in behind),
    )


def _mask(path: Path, size: tuple[int, int]) -> Image.Image:
    """A mask, black and white, as large as its picture of `size` (width, height)."""
    mask = Image.fromarray(pictures.read_mask(path).astype(np.uint8) * 255)
    if mask.size != size:
        raise Unfit("a mask is not as large as its picture")
    return mask


def _square(picture: Image.Image, side: int) -> np.ndarray:
    """(side, side): scaled by its short side, and cut around its centre."""
    scale = side / min(picture.size)
    picture = _scaled(picture, tuple(max(side, round(edge * scale)) for edge in picture.size))
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return np.asarray(picture.crop((left, top, left + side, top + side)))


def _padded(picture: Image.Image, side: int) -> np.ndarray:
    """(side, side): scaled by its long side, and padded in the colour of its edge (a mask: with nothing)."""
    scale = side / max(picture.size)
    pixels = np.asarray(_scaled(picture, tuple(max(1, round(edge * scale)) for edge in picture.size)))
    whole = np.zeros((side, side, *pixels.shape[2:]), np.uint8)
    if pixels.ndim == 3:
        whole[:] = np.rint(edge_colour(pixels))
    top, left = ((side - edge) // 2 for edge in pixels.shape[:2])
    whole[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
    return whole


def _scaled(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    if picture.size == size:
        return picture
    return picture.resize(size, Image.Resampling.NEAREST if picture.mode == "L" else Image.Resampling.LANCZOS)


# --- Subjects200K ----------------------------------------------------------------------------------------------------


def _plan_subjects200k(settings: params.Source, folder: Path) -> Iterator[Draft]:
    """Rows of the wanted collections whose every quality is good enough; their pictures are not looked at."""
    limits = settings.subjects200k
    for path in sorted(folder.rglob("*.parquet")):
        try:
            table = pq.read_table(path, columns=["collection", "quality_assessment", "description"])
        except (pa.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise StageError(f"{path} is no file of Subjects200K ({reason}): fetch it again") from None
        for row, values in enumerate(table.to_pylist()):
            told, quality = values["description"] or {}, values["quality_assessment"] or {}
            good = all((quality.get(name) or 0) >= limits.quality for name in QUALITIES)
            if values["collection"] in limits.collections and good and told.get("item"):
                yield _panel_draft(path.relative_to(folder).as_posix(), row, values["collection"], told)


def _panel_draft(file: str, row: int, collection: str, told: Mapping[str, Any]) -> Draft:
    item = told["item"].strip()
    said = [str(told.get(f"description_{i}") or "") for i in (0, 1)]
    facts = {"source": "Yuanshi/Subjects200K", "file": file, "row": row, "descriptions": said}
    return Draft(
        id=f"{Path(file).stem}-{row:06d}",
        prompt=said[1],
        split="",
        subjects=(item,),
        identities=(f"{collection}/{plain(item)}",),
        provenance={NAME: facts | {"collection": collection}},
    )


class _Panels:
    """Reads rows of its files; holds one row group, for a plan's rows come in their order."""

    def __init__(self):
        self.held: tuple[Path | None, int, list] = (None, -1, [])

    def __call__(self, settings: params.Source, draft: Draft) -> Draft:
        facts = draft.provenance[NAME]
        stored = self._row(Path(settings.folder) / facts["file"], facts["row"])
        panels = _panels(pictures.read(stored, "its picture"), settings.subjects200k.padding)
        order = {"first": (0, 1), "second": (1, 0)}.get(settings.subjects200k.reference) or _plainer_first(panels)
        photo, win = (panels[i] for i in order)
        prompt = facts["descriptions"][order[1]]
        # What a row calls its item need not stand in the description word for word; its last word mostly does.
        (item,) = draft.subjects
        subject = item if mentions(prompt, item) else item.split()[-1]
        images = {"win": _square(win, settings.size), "references": (_padded(photo, settings.size),)}
        return replace(draft, prompt=prompt, subjects=(subject,), **images)

    def _row(self, path: Path, row: int) -> bytes:
        try:
            with pq.ParquetFile(path) as file:
                start = 0
                for group in range(file.num_row_groups):
                    count = file.metadata.row_group(group).num_rows
                    if row < start + count:
                        if self.held[:2] != (path, group):
                            images = file.read_row_group(group, columns=["image"])["image"].to_pylist()
                            self.held = (path, group, images)
                        return self.held[2][row - start]["bytes"] or b""
                    start += count
        except (pa.ArrowException, OSError, KeyError) as error:
            raise StageError(f"{path} cannot be read ({str(error).splitlines()[0]}): fetch it again") from None
        raise StageError(f"{path} has no row {row} any more: plan again, in a new run")


def _panels(picture: Image.Image, padding: int) -> list[Image.Image]:
    """The two panels of a picture: `padding` pixels to the left of each and above them, as published."""
    side = picture.height - padding
    if side < 1 or picture.width != 2 * (side + padding):
        raise Unfit("its picture is no pair of panels")
    lefts = (padding, 2 * padding + side)
    return [picture.crop((left, padding, left + side, padding + side)) for left in lefts]


def _plainer_first(panels: list[Image.Image]) -> tuple[int, int]:
    """The panel with the plainer edge is the reference."""
    plain_share = [edge_share(np.asarray(panel), tolerance=12) for panel in panels]
    return (0, 1) if plain_share[0] >= plain_share[1] else (1, 0)


# --- UNO-1M ----------------------------------------------------------------------------------------------------------


def _plan_uno_1m(settings: params.Source, folder: Path) -> Iterator[Draft]:
    """Pairs of one subject that score high enough: the first picture is the reference, the second the winner."""
    lists = sorted((folder / "labels").glob("*.json"), key=lambda path: (len(path.name), path.name))
    for path in lists:
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
            for number, row in enumerate(rows):
                told, score = row["caption"], float(row["vlm_filter_cot"]["score_final"])
                good = settings.uno_1m.score <= score <= TOP_SCORE and told["judgment"] in ("same", "yes")
                if good and len(told["subject"]) == 1:
                    yield _uno_draft(f"{path.stem}-{number:06d}", row["img_path1"], row["img_path2"], told)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise StageError(f"{path} is no list of UNO-1M ({reason}): fetch it again") from None


def _uno_draft(name: str, reference: str, win: str, told: Mapping[str, Any]) -> Draft:
    files = {"win": f"images/{win}", "references": [f"images/{reference}"], "masks": [], "reference_masks": []}
    return Draft(
        id=name,
        prompt=told["img_path2"],
        split="",
        subjects=(told["subject"][0],),
        identities=(reference,),
        provenance={NAME: {"source": "bytedance-research/UNO-1M", "files": files}},
    )


PLANS = {"photos": _plan_photos, "subjects200k": _plan_subjects200k, "uno_1m": _plan_uno_1m}
