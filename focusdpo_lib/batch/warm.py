"""Kernels that start warm: forked from one process that has imported what the notebooks import.

Imports take a fresh kernel ten seconds and more, thirteen times in a reproduction. Where nothing may be forked
(`workers.FORKS`) kernels start as ever; with a GPU runs last hours.
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Mapping, Sequence

from jupyter_client.provisioning import LocalProvisioner

from focusdpo_lib.workers import FORKS, context, forked, preload

IMPORTED = [
    *("focusdpo_lib.comparison", "focusdpo_lib.plots", "focusdpo_lib.toybox.reader", "open_clip"),
    *("focusdpo_lib.backbones.flux_uno", "focusdpo_lib.backbones.sdxl_ip", "ipykernel.kernelapp"),
]
if FORKS:
    preload(IMPORTED)


class WarmKernel(LocalProvisioner):
    """A kernel of this Python, forked; jupyter_client finds it by the entry point in pyproject.toml."""

    async def launch_kernel(self, cmd, **kwargs):
        if not FORKS:
            return await super().launch_kernel(cmd, **kwargs)
        arguments = cmd[cmd.index("ipykernel_launcher") + 1 :]
        process = context.Process(target=_serve, args=(arguments, kwargs["env"], str(kwargs.get("cwd") or os.getcwd())))
        process.start()
        self.process = _Popen(process)
        self.pid = self.pgid = process.pid  # see `setsid` below
        return self.connection_info


class _Popen:
    """A process of multiprocessing with the methods that jupyter_client knows a kernel's process by."""

    stdin = stdout = stderr = None

    def __init__(self, process: multiprocessing.Process) -> None:
        self.process, self.pid = process, process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self) -> int | None:
        self.process.join()
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _serve(arguments: Sequence[str], environment: Mapping[str, str], folder: str) -> None:
    """The life of a forked kernel, which from here on is as if it had been started by itself."""
    import matplotlib
    from ipykernel.kernelapp import IPKernelApp

    # The batch's end, however it comes, is the kernel's: the warm process would go on for as long as it has children.
    forked()
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    multiprocessing.set_start_method(None, force=True)
    # What matplotlib reads when it is imported, which it was before there was a notebook to draw in.
    matplotlib.rcParams["backend"] = environment.get("MPLBACKEND") or "module://matplotlib_inline.backend_inline"
    sys.argv = ["ipykernel_launcher", *arguments]
    of_parent = f"--IPKernelApp.parent_handle={os.getppid()}"  # or it says that it was started by hand
    IPKernelApp.launch_instance(argv=[*arguments, of_parent])
