"""The run of a chain: stage after stage, each part by part, in as many processes as there are.

    <folder>/plan/part-00000.parquet  …  <folder>/<stage>/part-00000.parquet  …

A stage's part holds the drafts that came in to it, each filled in further or dropped with a reason; those that are
dropped stand in no later part. Parts appear whole, and whatever is there is not made again: a run that was killed goes
on at its last part. Beside each lies a CSV of how long it took, for the run sheet.
"""

import csv
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from focusdpo_lib import workers
from focusdpo_lib.dip import drafts
from focusdpo_lib.dip.chain import Draft, Maker, Stage
from focusdpo_lib.runs import RunError, atomic, require_space, write_json
from focusdpo_lib.workers import Progress, Shard

PLAN = "plan"
PLANNED = "planned.json"  # in the plan's folder: how many, once all are there
Plan = Callable[[], Iterable[Draft]]  # the drafts without what the stages add; each call gives the same


def run_chain(
    folder: Path, plan: Plan, stages: Sequence[Stage], part_size: int, draft_bytes: int, processes: int = 1
) -> None:
    """Makes whatever the folder lacks of the plan and of every stage's parts, the stages one after the other.

    `draft_bytes`: what one draft takes at the end, about. Raises RunError where the disk has no room for all, and what
    a stage raises: what is complete is kept.
    """
    names = [PLAN, *(stage.name for stage in stages)]
    if len(set(names)) < len(names):
        raise RunError(f"two stages of the chain have one name ({', '.join(names)}): give each its own")
    count = write_plan(folder, plan, part_size)
    there = sum(len(drafts.parts(folder, name)) for name in names[1:])
    missing = max(0, count * len(stages) - there * part_size)
    require_space(folder, missing * draft_bytes, f"{count} drafts in {len(stages)} stages")
    for before, stage in zip(names, stages, strict=False):
        work = Making(folder, before, stage)
        if work.missing():
            workers.run(work, folder, min(processes, len(drafts.parts(folder, before))), stage.name, "draft")


def write_plan(folder: Path, plan: Plan, part_size: int) -> int:
    """Writes the plan in parts, if it is not there whole; returns how many drafts it has. Raises RunError."""
    path, seen = folder / PLAN / PLANNED, set()
    if not path.exists():
        planned, number = iter(plan()), 0
        while some := list(islice(planned, part_size)):
            if again := [draft.id for draft in some if draft.id in seen or seen.add(draft.id)]:
                raise RunError(f"the plan has two drafts {again[0]!r}: give each an id of its own")
            drafts.write(drafts.part(folder, PLAN, number), drafts.table(some))
            number += 1
        if not seen:
            raise RunError(f"the plan for {folder} has no draft: ask for at least one")
        write_json(path, {"drafts": len(seen), "part_size": part_size})
    return sum(drafts.length(path) for path in drafts.parts(folder, PLAN))


@dataclass(frozen=True)
class Making:
    """The work of a stage: a shard takes every n-th part, and opens the stage once it finds one to make."""

    folder: Path
    before: str  # the stage before
    stage: Stage

    def missing(self, shard: Shard = workers.WHOLE) -> list[int]:
        """The numbers of the parts of a shard that are not there yet."""
        numbers = range(shard[0], len(drafts.parts(self.folder, self.before)), shard[1])
        return [n for n in numbers if not self._part(n).exists()]

    def __call__(self, shard: Shard, progress: Progress) -> None:
        todo, make = self.missing(shard), None
        sizes = {n: drafts.length(drafts.part(self.folder, self.before, n)) for n in todo}
        progress.expects(sum(sizes.values()))
        for n in todo:
            progress.begins(f"part {n} of {self.stage.name}")
            start, opening, encoded = time.perf_counter(), 0.0, {}
            came = [d for d in drafts.read(drafts.part(self.folder, self.before, n), encoded) if not d.dropped]
            if came and make is None:
                opened = time.perf_counter()
                make = self.stage.open()
                opening = time.perf_counter() - opened
            made = self._made(make, came) if came else []
            rows = drafts.table(made, encoded)
            _write_times(self._part(n), made, time.perf_counter() - start - opening, opening)
            drafts.write(self._part(n), rows)
            if n == todo[0]:
                self._require_space_for_the_rest()
            progress.done(sizes[n])

    def _require_space_for_the_rest(self) -> None:
        """RunError where the disk has no room for the stage's other parts, if they are as large as those made."""
        made, missing = drafts.parts(self.folder, self.stage.name), len(self.missing())
        largest = max(path.stat().st_size for path in made)
        require_space(self.folder, missing * largest, f"the {missing} parts of {self.stage.name} that are missing")

    def _made(self, make: Maker, came: Sequence[Draft]) -> list[Draft]:
        made = list(make(came))
        if [draft.id for draft in made] != [draft.id for draft in came]:
            raise RunError(
                f"{self.stage.name} was given {len(came)} drafts and returned {len(made)}, or others: a stage is to "
                "return every draft, in order, filled in or dropped"
            )
        if odd := [draft.id for draft in made if bool(draft.dropped) != (draft.dropped_by == self.stage.name)]:
            raise RunError(f"{self.stage.name} dropped the draft {odd[0]!r} without name or reason: use Draft.drop")
        return made

    def _part(self, n: int) -> Path:
        return drafts.part(self.folder, self.stage.name, n)


def _write_times(part: Path, made: Sequence[Draft], seconds: float, opening: float) -> None:
    """Written before the part: one that is there without them would never get any."""
    out = sum(not draft.dropped for draft in made)
    noted = {"came": len(made), "out": out, "seconds": round(seconds, 4), "opening": round(opening, 4)}
    with atomic(times(part)) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([noted.keys(), noted.values()])


def times(part: Path) -> Path:
    """The file beside a part that says how long it took."""
    return part.with_suffix(".csv")


def stage_drafts(folder: Path, stage: str) -> Iterator[Draft]:
    """The drafts of a stage, in the order of the plan, those that it dropped among them; a part at a time in memory."""
    for path in drafts.parts(folder, stage):
        yield from drafts.read(path)
