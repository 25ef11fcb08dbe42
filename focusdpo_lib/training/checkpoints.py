"""What a training keeps on disk while it runs: one checkpoint file, and a log with one row a pair and step."""

import csv
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from focusdpo_lib.runs import NO_SPACE, RunError, atomic, locked

LOG = "steps.csv"
CHECKPOINT = "checkpoint.safetensors"
LOCK = ".training"


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keeps other processes from training in the same folder; the system lets go of it however this process ends."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder / LOCK))
        except BlockingIOError:
            raise RunError(f"another process is training in {folder}: wait for it, or end it") from None
        yield


def save_checkpoint(folder: Path, step: int, weights: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Writes weights and optimizer state after `step` steps as one file, whole or not at all."""
    tensors = {f"{i}.weight": weight for i, weight in enumerate(weights)}
    for i, weight in enumerate(weights):
        tensors |= {f"{i}.{name}": torch.as_tensor(value) for name, value in optimizer.state[weight].items()}
    # Copied: quantized optimizers share tables among their states, which safetensors refuses.
    tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    with atomic(folder / CHECKPOINT) as partial:
        save_file(tensors, partial, {"step": str(step)})


def resume(folder: Path, weights: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
    """Loads the folder's checkpoint into weights and optimizer; returns its step, or 0 where there is none.

    Raises RunError if the checkpoint is of an adapter of other shapes.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return 0
    states: dict[int, dict[str, torch.Tensor]] = {}
    with safe_open(path, "pt") as file:
        step = int(file.metadata()["step"])
        for key in file.keys():  # noqa: SIM118 (it is no dict)
            index, name = key.split(".")
            states.setdefault(int(index), {})[name] = file.get_tensor(key)
    loaded = [states[i].pop("weight") for i in sorted(states)]
    if [tensor.shape for tensor in loaded] != [weight.shape for weight in weights]:
        raise RunError(f"{path} is of another adapter: choose another run name, or delete {folder}")
    for i, (weight, tensor) in enumerate(zip(weights, loaded, strict=True)):
        weight.data.copy_(tensor)
        optimizer.state[weight] = {name: _restored(value, weight.device) for name, value in states[i].items()}
    return step


def _restored(value: torch.Tensor, device: torch.device) -> torch.Tensor | int:
    """A part of an optimizer's state: torch counts steps in a float tensor on the CPU, bitsandbytes in an int."""
    if value.ndim:
        return value.to(device)
    return value if value.is_floating_point() else value.item()


def cut_log(folder: Path, step: int) -> None:
    """Drops the log's rows from `step` on: a resumed run writes them again."""
    path = folder / LOG
    if step == 0:
        path.unlink(missing_ok=True)
    elif path.exists():
        with atomic(path) as partial, open(path, newline="") as old, open(partial, "w", newline="") as new:
            new.writelines(_until(old, step))


def _until(lines: Iterator[str], step: int) -> Iterator[str]:
    """The header and the rows of steps before `step`; a row without line end was cut short by a kill, and is later."""
    yield next(lines)
    for line in lines:
        if not line.endswith("\n") or int(line.split(",", 1)[0]) >= step:
            return
        yield line


def append_log(folder: Path, entries: list[dict]) -> None:
    """Adds rows to the log, durably. Raises RunError on a full disk."""
    path = folder / LOG
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with open(path, "a", newline="") as file:
            writer = csv.DictWriter(file, list(entries[0]))
            if not file.tell():
                writer.writeheader()
            writer.writerows(entries)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise RunError(
            f"no space left to write {path}: free some disk space and run again; it goes on from {folder / CHECKPOINT}"
        ) from error
