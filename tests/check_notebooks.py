"""`make lint`: every notebook is committed without outputs and has one parameters cell, of literals.

python tests/check_notebooks.py notebooks
"""

import sys
from pathlib import Path

from focusdpo_lib.batch import notebooks
from focusdpo_lib.params import ParameterError


def problems(path: Path) -> list[str]:
    """What keeps the notebook from being committed, one sentence each."""
    try:
        notebooks.parameters(path)
        notebook = notebooks.read(path)
    except ParameterError as error:
        return [str(error)]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    run = [n for n, cell in enumerate(code, 1) if cell.outputs or cell.execution_count is not None]
    found = []
    if run:
        found.append(f"code cell {run[0]} of {path} has outputs or an execution count")
    if "widgets" in notebook.metadata:
        found.append(f"{path} holds the state of widgets")
    return [f"{text}: clear it with 'make strip'" for text in found]


def main(folder: str) -> int:
    """Prints the problems of every notebook of the folder; the exit code."""
    paths = sorted(p for p in Path(folder).rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
    found = [text for path in paths for text in problems(path)]
    print("\n".join(found) or f"{len(paths)} notebooks: no outputs, one parameters cell of literals each")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
