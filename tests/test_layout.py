"""The house has floors: no import runs from a lower one to a higher one; and what is not used is not imported."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "focusdpo_lib"
# From the ground up; what stands on one line does not import each other. Of a folder's files none is above another.
FLOORS = [
    ("strict_yaml", "pictures", "uncollected"),
    ("params", "provenance", "masks", "objectives"),
    ("runs",),
    ("cluster",),
    ("workers",),
    ("evaluation", "backbones"),
    ("generation",),
    ("toybox",),
    ("dip",),
    ("training",),
    ("plots", "grade"),
    ("stage_inputs",),
    ("dip_stages",),
    ("stages", "bench"),
    ("external",),
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


def imported(*words: str) -> set[str]:
    """The top-level packages that a process has imported when it ends."""
    found = subprocess.run([sys.executable, "-X", "importtime", *words], capture_output=True, text=True, check=True)
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in found.stderr.splitlines()}


COMMANDS = ("batch", "batch.reproduce", "batch.dip_plan", "evaluation.external", "evaluation.dreambench")


@pytest.mark.parametrize("command", COMMANDS)
def test_saying_how_it_is_used_takes_a_command_no_torch(command):
    packages = imported("-m", f"focusdpo_lib.{command}", "--help")
    assert "argparse" in packages and packages.isdisjoint({"torch", "diffusers", "nbformat", "papermill"})
    assert "pandas" not in packages or command == "batch.dip_plan"  # it prints one


@pytest.fixture(scope="module")
def asked():
    """What a process says that imports the stages, and bitsandbytes after them: what each brought along."""
    code = (
        "import os, sys, focusdpo_lib.stages; print(*{name.partition('.')[0] for name in sys.modules}); "
        "import bitsandbytes; print('torch._inductor.compile_fx' in sys.modules, "
        "os.environ.get('TORCHDYNAMO_DISABLE'), bitsandbytes.__spec__.loader is bitsandbytes.__loader__, "
        "bitsandbytes.__file__)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return found.stdout.splitlines()


def test_the_stages_import_the_large_libraries_where_they_use_them(asked):
    packages = set(asked[0].split())
    assert "torch" in packages
    assert packages.isdisjoint({"diffusers", "transformers", "peft", "open_clip", "timm", "torchvision", "datasets"})


def test_bitsandbytes_is_imported_without_torch_s_compiler(asked):
    pytest.importorskip("bitsandbytes")
    assert asked[1].startswith("False None True /")
