"""Stages of a chain that take no time: processes import this file and nothing heavy."""

import os
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from focusdpo_lib.dip.chain import Draft, Unfit, one_by_one
from focusdpo_lib.pictures import PictureError
from focusdpo_lib.runs import RunError

SIZE = 16


def plan(count=20):
    """Drafts 0, 1, …; every image of a draft is of its number alone."""
    return [Draft(str(i), f"a mug number {i}", "train", ("mug",), (f"mug {i}",)) for i in range(count)]


def image(draft, of):
    return np.random.default_rng([int(draft.id), of]).integers(0, 255, (SIZE, SIZE, 3), np.uint8)


@dataclass(frozen=True)
class Drawing:
    """Fills in pictures and notes; drops, raises or dies at the drafts that it is told."""

    name: str
    folder: Path | None = None  # where it notes that it was opened
    drops: tuple[int, ...] = ()
    unreadable: tuple[int, ...] = ()
    raises: int | None = None
    dies: int | None = None  # once
    pause: float = 0.0

    def open(self):
        if self.folder is not None:
            (self.folder / f"{self.name}-{os.getpid()}-{time.monotonic_ns()}").touch()
        return one_by_one(self.name, self.make)

    def make(self, draft):
        time.sleep(self.pause)
        number = int(draft.id)
        if number in self.drops:
            raise Unfit("it is too small")
        if number in self.unreadable:
            raise PictureError(f"the image /photos/{number}.png cannot be read: delete it")
        if number == self.raises:
            raise RunError("the server at localhost is gone: start it and run again")
        if number == self.dies and not (self.folder / "died").exists():
            (self.folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        mask = np.zeros((SIZE, SIZE), bool)
        mask[4:12, 4:12] = True
        made = {"win": image(draft, 0), "references": (image(draft, 1)[:8],), "masks": (mask,)}
        notes = {self.name: {"seed": np.int64(number), "model": "ünï"}}
        return replace(draft, **made, provenance=draft.provenance | notes, scores={"third": 1 / 3})
