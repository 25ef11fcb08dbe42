"""Answers that were paid for: kept by content, and counted against a budget by all processes that ask."""

import fcntl
import hashlib
import json
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from focusdpo_lib.dip.models import StageError
from focusdpo_lib.runs import RunError, full_disk_is_said, write_json


@dataclass(frozen=True)
class Reply:
    """What a captioner said; `tokens` are those read and those written, `cost` is in dollars."""

    text: str
    refused: bool = False
    model: str = ""
    tokens: tuple[int, int] = (0, 0)
    cost: float = 0.0


class Answers:
    """A folder of replies by what was asked: picture, prompt and model. Many processes may share it."""

    def __init__(self, folder: Path):
        self.folder = folder

    def _file(self, picture: bytes, prompt: str, model: str) -> Path:
        parts = (hashlib.sha256(part).hexdigest() for part in (picture, prompt.encode(), model.encode()))
        key = hashlib.sha256(" ".join(parts).encode()).hexdigest()
        return self.folder / key[:2] / f"{key}.json"

    def get(self, picture: bytes, prompt: str, model: str) -> Reply | None:
        """The reply, or none where there is none that can be read."""
        try:
            kept = json.loads(self._file(picture, prompt, model).read_text(encoding="utf-8"))
            return Reply(**kept | {"tokens": tuple(kept["tokens"])})
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def put(self, picture: bytes, prompt: str, model: str, reply: Reply) -> None:
        write_json(self._file(picture, prompt, model), asdict(reply))


class Purse:
    """A hard budget in dollars (none: what is spent is only counted), kept in a file beside the answers.

    Before a question its highest cost is set aside, and afterwards its true cost takes that place. What a killed
    process had set aside stays counted: it may have been charged.
    """

    def __init__(self, folder: Path, budget: float | None):
        self.file, self.budget = folder / "spent.jsonl", budget
        self._read, self._open, self._paid = 0, {}, 0.0
        self._alone = threading.Lock()

    @property
    def spent(self) -> float:
        """Dollars, by all processes so far, with what is set aside."""
        with self._held():
            return self._total()

    @contextmanager
    def paying(self, most: float) -> Iterator[Callable[[float], None]]:
        """Sets `most` aside; what is yielded takes the true cost, which is `most` itself where it is not called.

        Raises StageError where `most` is more than is left.
        """
        question = uuid.uuid4().hex
        with self._held():
            if self.budget is not None and self._total() + most > self.budget:
                raise StageError(
                    f"the budget of {self.budget:.2f} dollars is used up ({self._paid:.2f} spent, {most:.4f} for the "
                    f"next caption): raise captioning.budget and run again; all answers are kept in {self.file.parent}"
                )
            self._note({"question": question, "most": most})

        def settle(cost: float) -> None:
            with self._held():
                self._note({"question": question, "paid": cost})

        yield settle

    @contextmanager
    def _held(self) -> Iterator[None]:
        with self._alone:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with full_disk_is_said(self.file), self.file.open("a+b") as ledger:
                fcntl.flock(ledger, fcntl.LOCK_EX)
                self._ledger = ledger
                ledger.seek(self._read)
                for line in ledger.read().splitlines():
                    self._count(line)
                self._read = ledger.tell()
                yield

    def _count(self, line: bytes) -> None:
        try:
            entry = json.loads(line)
            if "most" in entry:
                self._open[entry["question"]] = float(entry["most"])
            else:
                self._open.pop(entry["question"], None)
                self._paid += float(entry["paid"])
        except (ValueError, KeyError, TypeError):
            raise RunError(
                f"{self.file} is damaged, so what was spent is unknown: delete it, and lower captioning.budget by that"
            ) from None

    def _total(self) -> float:
        return self._paid + sum(self._open.values())

    def _note(self, entry: dict) -> None:
        line = json.dumps(entry).encode() + b"\n"
        self._ledger.write(line)
        self._ledger.flush()
        self._count(line)
        self._read += len(line)
