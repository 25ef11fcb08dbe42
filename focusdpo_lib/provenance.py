"""Where a result comes from: commit, package versions, device, memory."""

import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

PACKAGES = (
    *("focusdpo_lib", "torch", "torchvision", "diffusers", "transformers", "peft", "accelerate"),
    *("open_clip_torch", "datasets", "numpy", "papermill"),
)


def facts() -> dict[str, Any]:
    """Everything below, as one dict of plain values."""
    return {
        "git": git_state(),
        "packages": versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        **device(),
        "peak_memory_bytes": peak_memory(),
    }


def git_state() -> dict[str, Any] | None:
    """Commit of the kit's checkout and whether files differ from it; None outside a checkout."""
    where = Path(__file__).resolve().parents[1]

    def git(*words: str) -> str:
        return subprocess.run(("git", *words), cwd=where, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None


@cache
def versions() -> dict[str, str]:
    """Installed versions of the packages that can change a result, as this process first found them."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def device() -> dict[str, Any]:
    """The device this process has computed on, and the peak of its GPU memory; never starts CUDA by itself."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.backends.mps.is_available():
        return {"device": f"mps ({processor()})", "peak_device_memory_bytes": torch.mps.driver_allocated_memory()}
    if torch is None or not torch.cuda.is_initialized():
        return {"device": f"cpu ({processor()}, {os.cpu_count()} cores)"}
    return {"device": torch.cuda.get_device_name(), "peak_device_memory_bytes": torch.cuda.max_memory_allocated()}


def processor() -> str:
    """The processor's name where the system tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def peak_memory() -> int:
    """Largest resident memory, in bytes, of this process or of one of its finished children."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
