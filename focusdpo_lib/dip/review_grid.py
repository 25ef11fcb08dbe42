"""The review grid in JupyterLab: pages of pairs as pictures, decided by keys or clicks (see `review` for what is kept).

A page of twelve pairs is one glance and, where nothing is wrong with it, one key. 500 pairs an hour leave 86 seconds a
page. No browser code of its own: keys are typed into a text field, which sends each of them to the kernel.
"""

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from focusdpo_lib.dip import drafts
from focusdpo_lib.dip.chain import Draft
from focusdpo_lib.dip.review import HELP, KEYS, WHY, Desk, Review
from focusdpo_lib.dip.scoring import NAME as SCORED

COLUMNS, HEIGHT = 3, 110  # of the grid; pixels of a picture
OUTLINE = (230, 159, 0), (86, 180, 233), (204, 121, 167), (0, 158, 115)  # of the subjects
GREEN, RED, GREY = "#cde8d5", "#f4c7c3", "#eeeeee"


def sheet(draft: Draft, height: int = HEIGHT) -> Image.Image:
    """References, winner with its subjects outlined, loser: side by side."""
    shown = [*draft.references, draft.win, draft.lose]
    sizes = [round(image.shape[1] * height / image.shape[0]) for image in shown]
    wide = Image.new("RGB", (sum(sizes) + 4 * (len(shown) - 1), height), "white")
    at = 0
    for number, (image, width) in enumerate(zip(shown, sizes, strict=True)):
        how = Image.Resampling.NEAREST if image.shape[0] < height else Image.Resampling.LANCZOS
        picture = Image.fromarray(image).resize((width, height), how)
        if number == len(draft.references):
            _outline(picture, draft.masks)
        wide.paste(picture, (at, 0))
        at += width + 4
    return wide


def _outline(picture: Image.Image, masks: Sequence[np.ndarray]) -> None:
    for mask, colour in zip(masks, OUTLINE, strict=False):
        inside = Image.fromarray(mask).convert("L").resize(picture.size, Image.Resampling.NEAREST)
        edge = ImageChops.subtract(inside, inside.filter(ImageFilter.MinFilter(3)))
        picture.paste(colour, (0, 0), edge)


def pictures_of(chain: Path) -> Callable[[Sequence[str]], list[Draft]]:
    """What finds the pairs of a page in a chain's folder."""
    return lambda pairs: drafts.find(chain, SCORED, pairs)


class Grid:
    """The face of a `Desk`: `Grid(review, find).widget` at the end of a cell."""

    def __init__(self, review: Review, find: Callable[[Sequence[str]], list[Draft]]) -> None:
        import ipywidgets as w

        self.desk, self.find, self._typed = Desk(review), find, ""
        self._drawn: tuple[str, ...] | None = None
        self.keys = w.Text(placeholder="click here, then use the keys", description="keys")
        self.why = w.ToggleButtons(options=WHY, description="reject for", style={"button_width": "110px"})
        self.said = w.HTML()
        wide = w.Layout(width="max-content")
        buttons = [w.Button(description=t, layout=wide) for t in ("accept the rest, next page", "undo", "back", "on")]
        for button, key in zip(buttons, " ubn", strict=True):
            button.on_click(lambda _, key=key: self.press(key))
        self.cells = [_Cell(w, i, self.toggle) for i in range(review.page_size)]
        layout = w.Layout(grid_template_columns=f"repeat({COLUMNS}, minmax(0, 1fr))", grid_gap="4px 12px")
        grid = w.GridBox([cell.box for cell in self.cells], layout=layout)
        self.widget = w.VBox([w.HTML(_bold(HELP)), w.HBox([self.keys, *buttons]), self.why, self.said, grid])
        self.keys.observe(self._type, "value")
        self.why.observe(lambda change: setattr(self.desk, "why", change["new"]), "value")
        self.draw()

    def _type(self, change: dict) -> None:
        """What was typed since; the field is emptied only when it grows long, for a key may be under way meanwhile."""
        text, before = change["new"], self._typed
        self._typed = text
        for key in text[len(before) :] if text.startswith(before) else "":
            self.press(key)
        if len(text) > 200:
            self._typed = self.keys.value = ""

    def press(self, key: str) -> None:
        self.desk.press(key)
        self.why.value = self.desk.why
        self.draw()

    def toggle(self, number: int) -> None:
        self.press(KEYS[number])

    def draw(self) -> None:
        review, shown = self.desk.review, tuple(self.desk.shown)
        pace = review.pace()
        done, rejected = len(review.found), sum(not accepted for accepted, _ in review.found.values())
        self.said.value = (
            f"<b>{review.reviewer}</b>: page {self.desk.page + 1} of {review.pages} · {done} of {len(review.pairs)} "
            f"decided, {rejected} rejected" + (f" · {pace:.0f} pairs an hour" if pace else "")
        )
        if shown != self._drawn:
            found = self.find(shown)
            for cell, draft in zip(self.cells, [*found, *[None] * (len(self.cells) - len(found))], strict=True):
                cell.show(draft)
            self._drawn = shown
        for cell, pair in zip(self.cells, shown, strict=False):
            cell.mark(review.found.get(pair))


class _Cell:
    """One pair of a page: its picture, what is known of it, and a button that says and changes its verdict."""

    def __init__(self, w, number: int, toggle: Callable[[int], None]) -> None:
        self.key = KEYS[number]
        self.image, self.text = w.Image(format="png", layout=w.Layout(max_width="100%", object_fit="contain")), w.HTML()
        self.button = w.Button(layout=w.Layout(width="auto"))
        self.button.on_click(lambda _: toggle(number))
        self.box = w.VBox([self.button, self.image, self.text], layout=w.Layout(padding="2px"))

    def show(self, draft: Draft | None) -> None:
        self.box.layout.display = "none" if draft is None else "flex"
        if draft is not None:
            buffer = io.BytesIO()
            sheet(draft).save(buffer, "PNG")
            self.image.value = buffer.getvalue()
            numbers = (f"{name} {draft.scores[name]:.2f}" for name in ("similarity", "drop") if name in draft.scores)
            said = " · ".join([_escaped(draft.prompt), *numbers])
            self.text.value = f'<div style="line-height: 1.2">{draft.id}: {said}</div>'

    def mark(self, verdict: tuple[bool, str] | None) -> None:
        accepted, why = verdict or (True, "")
        state = "open" if verdict is None else "accepted" if accepted else f"rejected: {why}"
        self.button.description = f"{self.key} · {state}"
        self.button.style.button_color = GREY if verdict is None else GREEN if accepted else RED


def _bold(text: str) -> str:
    """Markdown's **bold** as HTML."""
    return "".join(part if i % 2 == 0 else f"<b>{part}</b>" for i, part in enumerate(text.split("**")))


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
