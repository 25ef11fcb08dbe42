"""A safetensors file written row by row: it may be larger than memory, and goes on where a killed process left it."""

import json
import math
import os
from pathlib import Path

import torch

from focusdpo_lib.runs import RunError, full_disk_is_said, write_text

# The format: the header's length in 8 bytes, the header (JSON, padded to 8), and the tensors one after the other.
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL"}
PART, PROGRESS = ".part", ".progress"


class RowFile:
    """The file `path` of tensors with `total` rows each; it bears its name only once all rows are in it.

        file = RowFile(path, total)
        while file.rows < total:
            file.append(tensors, facts)  # (B, …) each, the rows from file.rows on

    `facts` are the header's texts, as safetensors keeps them; those of the first append hold.
    """

    def __init__(self, path: Path, total: int) -> None:
        self.path, self.total = path, total
        self.part, self.progress = path.with_suffix(PART), path.with_suffix(PROGRESS)
        self.rows = total if path.exists() else self._done()
        self._finish()

    def _done(self) -> int:
        """The rows that are safely in the unfinished file."""
        return int(self.progress.read_text(encoding="utf-8")) if self.part.exists() and self.progress.exists() else 0

    def _finish(self) -> None:
        """Gives the file its name once it has all rows; a kill may have come between."""
        if self.rows == self.total:
            if self.part.exists():
                os.replace(self.part, self.path)
            self.progress.unlink(missing_ok=True)

    def append(self, tensors: dict[str, torch.Tensor], facts: dict[str, str]) -> None:
        """Adds rows, durably. Raises RunError where the disk has no room, and where the rows are not of the kind of
        those in the file."""
        with full_disk_is_said(self.path):
            if self.rows == 0:
                self._begin(tensors, facts)
            with open(self.part, "r+b") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
                self._check(header, tensors)
                for name, tensor in tensors.items():
                    start = 8 + length + header[name]["data_offsets"][0]
                    file.seek(start + self.rows * tensor[0].nbytes)
                    file.write(tensor.contiguous().view(torch.uint8).numpy().tobytes())
                file.flush()
                os.fsync(file.fileno())
            self.rows += len(next(iter(tensors.values())))
            write_text(self.progress, str(self.rows))
        self._finish()

    def _check(self, header: dict, tensors: dict[str, torch.Tensor]) -> None:
        there = {name: (entry["dtype"], entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
        here = {name: (DTYPES[x.dtype], [self.total, *x.shape[1:]]) for name, x in tensors.items()}
        if there != here:
            raise RunError(f"{self.part} was begun with other tensors ({there}, now {here}): delete it and run again")

    def _begin(self, tensors: dict[str, torch.Tensor], facts: dict[str, str]) -> None:
        self.progress.unlink(missing_ok=True)  # of a file that somebody deleted
        header, size = {"__metadata__": facts}, 0
        for name, tensor in tensors.items():
            shape = [self.total, *tensor.shape[1:]]
            span = [size, size := size + math.prod(shape) * tensor.element_size()]
            header[name] = {"dtype": DTYPES[tensor.dtype], "shape": shape, "data_offsets": span}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(self.part, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + size)
