"""When jobs would run: list scheduling, as an engine does that starts whatever is ready and fits, in order."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from focusdpo_lib.params import Resources


@dataclass(frozen=True)
class Task:
    """A job as a scheduler sees it: minutes, what it asks for (on one node), and the tasks that it comes after."""

    name: str
    minutes: float
    needs: Resources = field(default_factory=Resources)
    after: Collection[str] = ()


@dataclass
class Node:
    """What is free on a machine; memory in GB, infinite where it is not counted."""

    gpus: float
    cpus: float
    memory: float = float("inf")

    def holds(self, needs: Resources) -> bool:
        return needs.gpus <= self.gpus and needs.cpus <= self.cpus and (needs.memory or 0) <= self.memory

    def take(self, needs: Resources, sign: int = 1) -> None:
        self.gpus -= sign * needs.gpus
        self.cpus -= sign * needs.cpus
        self.memory -= sign * (needs.memory or 0)


def spans(
    tasks: Sequence[Task], nodes: Sequence[Node], running: Mapping[str, float] | None = None
) -> dict[str, tuple[float, float]]:
    """When each task starts and ends, in minutes from now: {name: (start, end)}.

    `running`: for how many minutes those have run that run already (they are placed first); a task that takes longer
    than expected is about to end. Raises ValueError for a task that no node can hold, or that comes after itself.
    """
    running, now = running or {}, 0.0
    free = [Node(node.gpus, node.cpus, node.memory) for node in nodes]
    waiting = sorted(tasks, key=lambda task: task.name not in running)
    holding: list[tuple[Task, Node]] = []
    found: dict[str, tuple[float, float]] = {}
    while waiting or holding:
        unfinished = {task.name for task in waiting} | {task.name for task, _ in holding}
        for task in list(waiting):
            place = next((node for node in free if node.holds(task.needs)), None)
            if place is not None and unfinished.isdisjoint(task.after):
                place.take(task.needs)
                found[task.name] = now, now + max(0.0, task.minutes - running.get(task.name, 0.0))
                holding.append((task, place))
                waiting.remove(task)
        if not holding:
            raise ValueError(f"{waiting[0].name} never starts: no node can hold it, or it comes after itself")
        now = min(found[task.name][1] for task, _ in holding)
        for task, place in [held for held in holding if found[held[0].name][1] == now]:
            place.take(task.needs, -1)
            holding.remove((task, place))
    return found


def makespan(tasks: Sequence[Task], nodes: Sequence[Node], running: Mapping[str, float] | None = None) -> float:
    """Minutes until the last task ends; see `spans`."""
    return max((end for _, end in spans(tasks, nodes, running).values()), default=0.0)


def critical_path(tasks: Sequence[Task]) -> tuple[float, list[str]]:
    """Minutes of the longest chain of tasks that come after each other, and its names."""
    best: dict[str, tuple[float, list[str]]] = {}
    for task in tasks:  # each comes after those before it
        before = max((best[name] for name in task.after if name in best), default=(0.0, []))
        best[task.name] = before[0] + task.minutes, [*before[1], task.name]
    return max(best.values(), default=(0.0, []))
