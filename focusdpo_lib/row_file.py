"""A safetensors file written row by row: it may be larger than memory, and goes on where a killed process left it."""

import json
import math
import os
import shutil
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

    def _done(self) -> int:
        """The rows that are safely in the unfinished file."""
        return int(self.progress.read_text()) if self.part.exists() and self.progress.exists() else 0

    def append(self, tensors: dict[str, torch.Tensor], facts: dict[str, str]) -> None:
        """Adds rows, durably. Raises RunError where the disk has no room, for all rows before the first is written."""
        with full_disk_is_said(self.path):
            if self.rows == 0:
                self._begin(tensors, facts)
            with open(self.part, "r+b") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
                for name, tensor in tensors.items():
                    start = 8 + length + header[name]["data_offsets"][0]
                    file.seek(start + self.rows * tensor[0].nbytes)
                    file.write(tensor.contiguous().view(torch.uint8).numpy().tobytes())
                file.flush()
                os.fsync(file.fileno())
            self.rows += len(next(iter(tensors.values())))
            write_text(self.progress, str(self.rows))
        if self.rows == self.total:
            os.replace(self.part, self.path)
            self.progress.unlink()

    def _begin(self, tensors: dict[str, torch.Tensor], facts: dict[str, str]) -> None:
        header, size = {"__metadata__": facts}, 0
        for name, tensor in tensors.items():
            shape = [self.total, *tensor.shape[1:]]
            span = [size, size := size + math.prod(shape) * tensor.element_size()]
            header[name] = {"dtype": DTYPES[tensor.dtype], "shape": shape, "data_offsets": span}
        if (free := shutil.disk_usage(self.path.parent).free) < size:
            raise RunError(
                f"no space left to write {self.path}: it takes {size / 1e9:.1f} GB and {free / 1e9:.1f} GB are free"
            )
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(self.part, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + size)
