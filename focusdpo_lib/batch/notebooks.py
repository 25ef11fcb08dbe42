"""One notebook: its parameters cell, values checked against it, its execution by papermill, its HTML."""

import ast
import difflib
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from focusdpo_lib import params, runs
from focusdpo_lib.params import ParameterError

RUNS = ("run", "pairs")  # parameters that name a run, by which its folder is called


class NotebookError(RuntimeError):
    """A notebook that did not run to its end; the message says which, in which cell, why, and what is kept."""


def read(notebook: Path) -> Any:
    """The notebook, or a ParameterError that says why it cannot be read."""
    import nbformat  # a second: not for `--help`

    try:
        return nbformat.read(notebook, as_version=4)
    except FileNotFoundError:
        raise ParameterError(f"the notebook {notebook} does not exist: correct its path") from None
    except Exception as error:
        raise ParameterError(f"{notebook} is not a notebook ({error}): restore it, for example from git") from None


def source_hash(notebook: Path) -> str:
    """What the notebook says, without its outputs."""
    return runs.digest([[cell.cell_type, cell.source] for cell in read(notebook).cells])


def parameters(notebook: Path) -> dict[str, Any]:
    """The literals of the notebook's one cell tagged `parameters`; ParameterError if it is not of that form."""
    cells = [c for c in read(notebook).cells if "parameters" in c.metadata.get("tags", [])]
    if len(cells) != 1:
        raise ParameterError(f"{notebook} has {len(cells)} cells tagged 'parameters': tag exactly one")
    try:
        statements = ast.parse(cells[0].source).body
    except SyntaxError as error:
        raise ParameterError(f"the parameters cell of {notebook} is not Python ({error}): correct it") from None
    found = {}
    for statement in statements:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        try:
            name, value = targets[0].id, ast.literal_eval(statement.value)
        except (AttributeError, ValueError, TypeError):
            raise ParameterError(
                f"the parameters cell of {notebook} must hold 'name = literal' lines only, not "
                f"{ast.unparse(statement)!r}: move it to a later cell"
            ) from None
        found[name] = params.section(name, value, str(notebook)) and value if name in params.SECTIONS else value
    return found


def check(notebook: Path, values: Mapping[str, Any], where: str) -> None:
    """Every name and type of `values` (from the file or text `where`) against the notebook's parameters cell.

    papermill itself only warns of an unknown name, and after it has begun.
    """
    defaults = parameters(notebook)
    for name, value in values.items():
        if name not in defaults:
            close = difflib.get_close_matches(name, defaults, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(defaults) or 'none'}"
            raise ParameterError(f"{name} in {where} is not a parameter of {notebook}: remove it or rename it ({hint})")
        if name in params.SECTIONS:
            params.section(name, value, where)
        _check_type(name, value, defaults[name], where)
        if name in RUNS and isinstance(value, str):
            _check_run_name(name, value, where)


def _check_run_name(name: str, value: str, where: str) -> None:
    try:
        params.run_name(value)
    except ParameterError as error:
        raise ParameterError(f"{name} in {where}: {error}") from None


def execute(notebook: Path, output: Path, values: Mapping[str, Any], failed: Path, warm: bool = False) -> None:
    """Runs the notebook in its own folder (as JupyterLab does) into `output`, and writes `output`.html beside it.

    A notebook that stops is kept as far as it went as `failed`; NotebookError names the cell and the reason. `warm`:
    its kernel is forked from a process that has imported everything (see `warm`), which pays from the second one on.
    """
    with _explained(notebook, output, failed):
        _papermill(notebook, output, values, warm)
    _export_html(output)


def _check_type(name: str, value: Any, default: Any, where: str) -> None:
    """A value against the default: of its type (a group may be none), and neither empty nor below 0 where that is not.

    ParameterError says what it should be.
    """
    numbers = isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool)
    if default is None or (value is None and isinstance(default, dict)):
        return
    if type(value) is not type(default) and not numbers:
        hint = " (YAML reads a number such as 1e-8 as text: write 1.0e-8)" if isinstance(value, str) else ""
        kind = type(default).__name__
        raise ParameterError(f"{name} = {value!r} in {where} should be a {kind}{hint}: correct it there")
    if isinstance(default, list | str) and default and not value:
        raise ParameterError(f"{name} in {where} is empty: give it a value, or leave it out")
    if isinstance(value, list) and default:
        for number, item in enumerate(value):
            _check_type(f"{name}[{number}]", item, default[0], where)
    if isinstance(value, int | float) and not isinstance(value, bool) and (value < 0 or (value == 0 < default)):
        least = "above 0" if default > 0 else "0 or more"
        raise ParameterError(f"{name} = {value!r} in {where} should be {least}: correct it there")


def _papermill(notebook: Path, output: Path, values: Mapping[str, Any], warm: bool) -> None:
    import papermill
    import traitlets
    from ipykernel.kernelspec import get_kernel_dict
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec

    spec, sockets = get_kernel_dict(), TemporaryDirectory(prefix="focusdpo-")
    if warm:
        spec["metadata"]["kernel_provisioner"] = {"provisioner_name": "focusdpo-warm"}

    class ThisPython(AsyncKernelManager):
        """The kernel is the Python that runs this, whatever kernels are installed and whatever the notebook names.

        It is spoken to through files where the system has such sockets: of free ports, kernels that start side by side
        may each take the other's.
        """

        kernel_spec = KernelSpec(**spec)

        @traitlets.default("transport")
        def _files_where_there_are(self) -> str:
            return "ipc" if os.name == "posix" else "tcp"

        @traitlets.default("ip")
        def _in_a_folder_of_its_own(self) -> str:
            return f"{sockets.name}/kernel" if self.transport == "ipc" else "127.0.0.1"

        @traitlets.default("transport_encryption")
        def _encrypted_where_it_can_be(self) -> str:
            return "auto"

    with sockets:
        papermill.execute_notebook(
            *(str(path.resolve()).replace("{", "{{").replace("}", "}}") for path in (notebook, output)),  # formatted
            dict(values),
            kernel_name="python3",
            language="python",
            kernel_manager_class=ThisPython,
            cwd=notebook.resolve().parent,
            progress_bar=sys.stderr.isatty(),
        )


@contextmanager
def _explained(notebook: Path, output: Path, failed: Path) -> Iterator[None]:
    """Turns what stops a notebook into one sentence, and keeps the notebook as far as it went."""
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    try:
        yield
    except BaseException as error:
        with suppress(OSError):  # nothing was written yet, or the disk is full
            shutil.copyfile(output, failed)
        if isinstance(error, PapermillExecutionError):
            reason = " ".join(f"{error.ename}: {error.evalue}".split())
            text = f"cell [{error.exec_count}] of {notebook} ({_first_line(error.source)}) stopped with {reason}"
        elif isinstance(error, DeadKernelError):
            begun = [c for c in read(output).cells if c.cell_type == "code" and c.metadata.papermill.start_time]
            where = f"cell [{len(begun)}] of {notebook} ({_first_line(begun[-1].source)})"
            text = (
                f"the kernel died in {where}, most often for lack of memory: "
                "free some or lower the batch size, and run again; completed work is kept"
            )
        else:
            raise
        raise NotebookError(f"{text} (the notebook as far as it went: {failed})") from error


@cache  # it keeps the templates that it has read
def _exporter() -> Any:
    from nbconvert import HTMLExporter
    from nbconvert.preprocessors import CoalesceStreamsPreprocessor

    return HTMLExporter(preprocessors=[CoalesceStreamsPreprocessor])  # a progress bar is its last line


def _export_html(notebook: Path) -> None:
    page = _exporter().from_filename(str(notebook))[0]
    # The exporter sets listings that a cell displays in the font of the text.
    style = "<style>.jp-OutputArea-output .highlight pre {font-family: monospace; font-size: 90%}</style></head>"
    runs.write_text(notebook.with_suffix(".html"), page.replace("</head>", style, 1))


def _first_line(source: str) -> str:
    lines = [line for line in source.splitlines() if line.strip() and not line.startswith("#")]
    return f"`{lines[0] if lines else ''}`"
