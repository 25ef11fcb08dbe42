"""List scheduling against schedules that were drawn by hand."""

import pytest

from focusdpo_lib.batch.schedule import Node, Task, critical_path, makespan, spans
from focusdpo_lib.params import Resources

ONE, TWO = Resources(gpus=1), Resources(gpus=2)
#   pairs 1 ─┬─ a 4 (1 GPU) ─┬─ table 2 (2 GPUs)
#            ├─ b 3 (1 GPU) ─┤
#            └─ c 3 (2 GPUs) ┘
GRAPH = [
    Task("pairs", 1),
    Task("a", 4, ONE, ["pairs"]),
    Task("b", 3, ONE, ["pairs"]),
    Task("c", 3, TWO, ["pairs"]),
    Task("table", 2, TWO, ["a", "b", "c"]),
]


def node(gpus, cpus=8, memory=float("inf")):
    return Node(gpus, cpus, memory)


def test_two_gpus_run_what_fits_side_by_side():
    assert spans(GRAPH, [node(2)]) == {
        "pairs": (0, 1),
        "a": (1, 5),
        "b": (1, 4),
        "c": (5, 8),  # waits for both GPUs
        "table": (8, 10),
    }


def test_a_second_machine_takes_what_the_first_cannot():
    assert spans(GRAPH, [node(2), node(2)])["c"] == (1, 4)
    assert makespan(GRAPH, [node(2), node(2)]) == 7 == critical_path(GRAPH)[0]
    assert critical_path(GRAPH)[1] == ["pairs", "a", "table"]


def test_a_job_lies_on_one_machine():
    with pytest.raises(ValueError, match=r"^c never starts"):
        spans(GRAPH, [node(1), node(1)])


@pytest.mark.parametrize(("cpus", "memory", "expected"), [(2, 9, 3), (1, 9, 6), (2, 5, 6)])
def test_processors_and_memory_run_out_too(cpus, memory, expected):
    tasks = [Task(name, 3, Resources(cpus=1, memory=4)) for name in "ab"]
    assert makespan(tasks, [node(0, cpus, memory)]) == expected


def test_what_runs_already_has_so_much_less_to_go():
    left = [task for task in GRAPH if task.name != "pairs"]
    assert spans(left, [node(2)], {"c": 1})["c"] == (0, 2)
    assert makespan(left, [node(2)], {"c": 1}) == 2 + 4 + 2
    assert makespan([Task("a", 4)], [node(0)], {"a": 9}) == 0  # longer than expected: about to end


def test_jobs_that_end_together_make_room_together():
    tasks = [Task("a", 2, ONE), Task("b", 2, ONE), Task("big", 1, TWO), Task("small", 5, ONE)]
    assert spans(tasks, [node(2)])["big"] == (2, 3)


def test_nothing_takes_no_time():
    assert makespan([], [node(1)]) == 0 and critical_path([]) == (0, [])
