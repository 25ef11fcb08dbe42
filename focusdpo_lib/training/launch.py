"""One training over several processes, GPUs and machines: `accelerate launch` in a child process.

Notebook 03 starts it when `training.processes` is set: a GPU must not be touched before processes fork, and a kernel
that holds memory would starve its children, so nothing is trained in the notebook's own process then. With more
machines than one, all of them see the run's folder, the notebook runs on the first, and on each of the others, in
notebooks/, where the paths of the settings start,

    python -m focusdpo_lib.training.launch ../results/paper/training/RUN --pairs ../results/paper/prepared/HASH \\
        --processes 16 --machines 2 --machine-rank 1 --main-address HOST --main-port 29500

The engine `ray` needs none of this: it hands the same worker to Ray Train (see `focusdpo_lib.cluster`).
"""

import argparse
import codecs
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object

from focusdpo_lib import backbones, params, provenance, runs
from focusdpo_lib.training import TrainingError, ranks, train
from focusdpo_lib.training.memory import MemoryAdvice
from focusdpo_lib.training.pairs import load
from focusdpo_lib.workers import end_with_stdin, importing

FACTS = "processes.json"  # the device and peak memory of every process
LOG = "launch-{}.log"  # what the processes of a machine write to stderr; kept when they fail
ERROR = "error: "
MEETING = timedelta(minutes=10)  # how long a machine waits for the others
CONFIG = "accelerate.yaml"  # in place of what the user once answered to `accelerate config`, which would be taken else
NOTHING = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "NO",
    "mixed_precision": "no",
    "use_cpu": False,
    "debug": False,
}


def command(folder: Path, prepared: Path, processes: int, launch: params.Launch, machine_rank: int = 0) -> list[str]:
    """The command line for a training run; `processes` counts those of all machines.

    Raises TrainingError if the machines cannot share them or do not know where to meet.
    """
    if processes % launch.machines:
        raise TrainingError(
            f"training.processes = {processes} do not divide among {launch.machines} machines: correct one of them"
        )
    if launch.machines > 1 and not (launch.main_address and launch.main_port):
        raise TrainingError("launch.machines > 1 needs launch.main_address and launch.main_port, where they meet")
    options = {
        "config_file": Path(folder) / CONFIG,
        "num_processes": processes,
        "num_machines": launch.machines,
        "machine_rank": machine_rank,
        "main_process_ip": launch.main_address,
        "main_process_port": launch.main_port,
        "rdzv_conf": f"timeout={int(MEETING.total_seconds())}",
        "mixed_precision": "no",  # the backbone has its own autocast: one process and several compute the same
        "dynamo_backend": "no",
    }
    words = [f"--{name}={value}" for name, value in options.items() if value is not None]
    words += ["--multi_gpu"] if processes > 1 else []  # torchrun, also where there are only CPUs
    module = ["--module", "focusdpo_lib.training.launch", str(folder), "--pairs", str(prepared), "--worker"]
    return [sys.executable, "-m", "accelerate.commands.launch", *words, *module]


def run(words: Sequence[str], folder: Path, machine_rank: int = 0) -> None:
    """Runs a `command` whose output is shown as it comes. Raises TrainingError with what a failed process said.

    An interrupt, or the end of this process however it comes, ends them too; the run then goes on from its checkpoint,
    as after any kill.
    """
    log, text = Path(folder) / LOG.format(machine_rank), codecs.getincrementaldecoder("utf-8")("replace")
    threads = os.environ.get("OMP_NUM_THREADS", "1")  # as accelerate chooses, but without saying so
    runs.write_text(Path(folder) / CONFIG, yaml.safe_dump(NOTHING))
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1"}
    ranks.clear(environment)
    with open(log, "wb") as errors:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}  # see workers.end_with_stdin
        child = subprocess.Popen(words, **pipes, start_new_session=True, env=environment)
        try:
            while shown := child.stdout.read1(4096):
                print(text.decode(shown), end="", flush=True)
            code = child.wait()
        except BaseException:
            os.killpg(child.pid, signal.SIGTERM)
            child.wait()
            raise
    if code:
        raise TrainingError(_what_failed(log, code))
    log.unlink(missing_ok=True)


def _what_failed(log: Path, code: int) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    said = next((line.removeprefix(ERROR) for line in lines if line.startswith(ERROR)), None)
    if said is None and (code == -signal.SIGKILL or any("SIGKILL" in line or "exitcode: -9" in line for line in lines)):
        said = f"a process was killed, most often for want of main memory; it goes on from its checkpoint (see {log})"
    if said is None and any("DistStoreError" in line for line in lines):
        said = f"not all machines came within {MEETING.seconds // 60} minutes: start the command on each (see {log})"
    if said is None and any("DistNetworkError" in line for line in lines):
        said = (
            f"the first machine cannot be reached: start it, and correct launch.main_address and main_port (see {log})"
        )
    return said or f"a process ended with exit code {code}; {log} says why"


def work(folder: Path, prepared: Path) -> None:
    """One process of a training run: its settings come from the run's params.yaml."""
    values = yaml.safe_load((folder / runs.PARAMS).read_text(encoding="utf-8"))
    names = ("backbone", "objective", "masks", "training")
    use = {name: params.section(name, values[name], str(folder / runs.PARAMS)) for name in names}
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if gpus and here > gpus:
        raise TrainingError(
            f"{here} processes on a machine with {gpus} GPU(s): lower training.processes and raise "
            "training.gradient_accumulation by as much"
        )
    accelerator = Accelerator(
        cpu=backbones.best_device() == "cpu",
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],
    )
    if accelerator.num_processes != use["training"].processes:
        raise TrainingError(
            f"{accelerator.num_processes} processes were started for training.processes = {use['training'].processes}: "
            "give the same number on every machine"
        )
    backbone = use.pop("backbone")
    with MemoryAdvice(backbone, use["training"]):
        with importing():
            model = backbones.load(backbone, accelerator.device, parts="network")
        train(model, load(prepared), folder, **use, accelerator=accelerator)
    facts = gather_object([provenance.device() | {"peak_memory_bytes": provenance.peak_memory()}])
    if accelerator.is_main_process:
        runs.write_json(folder / FACTS, facts)
    accelerator.end_training()


def leave(code: int) -> NoReturn:
    """Ends this process at once, what it printed flushed.

    gloo's threads outlive `end_training`: one that met its peer's end while Python and the libraries are torn down
    could crash there, and a training that is done would count as failed.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m focusdpo_lib.training.launch", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("folder", type=Path, help="the training run, begun by notebook 03")
    parser.add_argument("--pairs", type=Path, required=True, help="its prepared pairs")
    parser.add_argument("--processes", type=int, default=1, help="of all machines")
    parser.add_argument("--machines", type=int, default=1)
    parser.add_argument("--machine-rank", type=int, default=0)
    parser.add_argument("--main-address")
    parser.add_argument("--main-port", type=int, default=0)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    try:
        if given.worker:
            end_with_stdin()  # whose other end `run` holds: it passes through accelerate's and torch's launchers
            work(given.folder, given.pairs)
        else:
            launch = params.Launch(machines=given.machines, main_address=given.main_address, main_port=given.main_port)
            words = command(given.folder, given.pairs, given.processes, launch, given.machine_rank)
            run(words, given.folder, given.machine_rank)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"{ERROR}{' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    leave(main())
