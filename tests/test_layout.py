"""The house has floors: no import runs from a lower one to a higher one."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "focusdpo_lib"
# From the ground up; what stands on one line does not import each other. Of a folder's files none is above another.
FLOORS = [
    ("params", "provenance", "masks", "objectives"),
    ("runs",),
    ("evaluation", "backbones"),
    ("generation",),
    ("toybox",),
    ("dip",),
    ("training",),
    ("plots",),
    ("stages", "bench"),
    ("comparison",),
    ("batch",),
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def imports(file: Path) -> set[str]:
    """The rooms that a file imports from, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "focusdpo_lib":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("focusdpo_lib."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("focusdpo_lib.")}
    return found


def test_every_room_stands_on_a_floor():
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert rooms - {"__init__"} == set(FLOOR)


def test_no_import_runs_upwards():
    upwards = [
        f"{file.relative_to(PACKAGE)} imports {other}"
        for file in PACKAGE.rglob("*.py")
        for room in [file.relative_to(PACKAGE).parts[0].removesuffix(".py")]
        for other in imports(file)
        if room != "__init__" and other != room and FLOOR[other] >= FLOOR[room]
    ]
    assert not upwards
