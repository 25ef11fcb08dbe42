"""The Ray cluster whose engine runs this notebook: shards as its tasks, and a training over its machines by Ray Train.

A run's own GPUs (`resources.gpus`) serve its own process and children. What needs more of them asks the cluster for one
each, and holds it for no longer than it runs; so a run that asks for more holds none itself.
"""

import os
import pickle
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from focusdpo_lib.runs import PARTIAL, RunError, atomic

ADDRESS = "FOCUSDPO_RAY"  # in a run's environment: where the engine's Ray is
RETRIES = 3  # of a task whose worker or node was lost
SHOWN, ERROR = "shown", "error"  # of a training's processes: what the first prints, and what one raised
QUIET = {"log_to_driver": False, "logging_level": "ERROR"}


def serves(processes: int) -> bool:
    """Whether so many processes, which want a GPU each, are the cluster's: it has some, and this run fewer."""
    return ADDRESS in os.environ and processes > max(1, own_gpus()) and _joined().cluster_resources().get("GPU", 0) > 0


def own_gpus() -> int:
    """How many GPUs the engine gave this run."""
    return len([name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name])


def _joined() -> Any:
    """The library, connected."""
    import ray

    if not ray.is_initialized():
        ray.init(address=os.environ[ADDRESS], **QUIET)
    return ray


class Task:
    """A function on one GPU somewhere in the cluster, with the methods of a process. Ray starts it again, if lost."""

    def __init__(self, function: Callable[..., None], *words: Any) -> None:
        self.ray = _joined()
        options = {"num_gpus": 1, "num_cpus": 0, "max_retries": RETRIES}  # of processors a run may hold all there are
        self.ref = self.ray.remote(**options)(function).remote(*words)

    def is_alive(self) -> bool:
        return not self.ray.wait([self.ref], timeout=0)[0]

    @property
    def exitcode(self) -> int | None:
        """None while it runs, 0, 1 where it raised, or -9 where it was lost more than RETRIES times."""
        if self.is_alive():
            return None
        try:
            self.ray.get(self.ref)
        except self.ray.exceptions.RayTaskError:
            return 1
        except self.ray.exceptions.RayError:
            return -9
        return 0

    def join(self) -> None:
        self.ray.wait([self.ref])

    def terminate(self) -> None:
        self.ray.cancel(self.ref, force=True)


def train(worker: Callable[[], None], processes: int, folder: Path) -> None:
    """Runs `worker` in so many processes of a torch process group, on a GPU each, by Ray Train's TorchTrainer.

    The first one's output is shown as it comes. `folder`, which all machines see, keeps what Ray Train writes
    meanwhile. A group that loses a worker or a node is started again. Raises what a worker raised, or RunError where
    the group was lost too often.
    """
    ray = _joined()
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    real = ray.get(ray.remote(num_gpus=1, num_cpus=0)(_sees_a_gpu).remote())  # and no pretend one
    with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=Path(folder).absolute()) as meanwhile:
        said = Path(meanwhile) / ERROR
        trainer = TorchTrainer(
            _in_group,
            train_loop_config={"worker": worker, "meanwhile": meanwhile, "cwd": os.getcwd()},
            torch_config=TorchConfig(backend="nccl" if real else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=processes, use_gpu=True, resources_per_worker={"CPU": 0, "GPU": 1}
            ),
            run_config=RunConfig(name="train", storage_path=meanwhile, failure_config=FailureConfig(RETRIES)),
        )
        try:
            with _following(Path(meanwhile) / SHOWN):
                trainer.fit()
        except TrainingFailedError as error:
            if said.exists():
                raise pickle.loads(said.read_bytes()) from None
            reason = [line.strip() for line in str(error).splitlines() if line.strip(" ^~")][-1][:300]
            raise RunError(
                f"the training over {processes} GPUs was lost {RETRIES + 1} times ({reason}): look at the machines, "
                "and run again; it goes on from its checkpoint"
            ) from error


def _sees_a_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _in_group(config: dict[str, Any]) -> None:
    """The life of a process of a training; what it raises would raise again, so it is not tried again."""
    import ray.train
    import torch

    meanwhile = Path(config["meanwhile"])
    if (said := meanwhile / ERROR).exists():
        raise RuntimeError("it failed before")
    os.chdir(config["cwd"])
    if not torch.cuda.is_available():  # on pretend GPUs
        os.environ.pop("ACCELERATE_TORCH_DEVICE", None)
    first = ray.train.get_context().get_world_rank() == 0
    with redirected(meanwhile / SHOWN if first else Path(os.devnull)):
        try:
            config["worker"]()
        except Exception as error:
            error.add_note(traceback.format_exc())
            with atomic(said) as partial:
                partial.write_bytes(pickle.dumps(error))
            raise


@contextmanager
def redirected(log: Path) -> Iterator[None]:
    """What this process and its children print goes to the end of a file."""
    kept = [os.dup(1), os.dup(2)]
    with open(log, "ab") as file:
        try:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
            yield
        finally:
            sys.stdout.flush()
            for stream, old in zip((1, 2), kept, strict=True):
                os.dup2(old, stream)
                os.close(old)


@contextmanager
def _following(file: Path) -> Iterator[None]:
    """Meanwhile, prints what comes to a file."""
    ended = threading.Event()

    def follow() -> None:
        at = 0
        while True:
            last = ended.wait(0.5)
            if file.exists():
                with open(file, "rb") as opened:
                    opened.seek(at)
                    news = opened.read()
                at += len(news)
                print(news.decode("utf-8", "replace"), end="", flush=True)
            if last:
                return

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
