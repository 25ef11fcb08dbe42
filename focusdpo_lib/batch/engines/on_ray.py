"""The engine `ray`: every job is a Ray task that asks for what its YAML states; Ray says when and where it runs.

It starts on this machine, or joins the cluster that RAY_ADDRESS names, whose machines see the same files and have the
same package. A task whose worker or node is lost is tried again and goes on where it was.
"""

import hashlib
import os
import platform
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from focusdpo_lib import cluster, params, runs
from focusdpo_lib.batch.engines.said import say, span
from focusdpo_lib.batch.engines.worker import EngineError, log_of, orders, started, work
from focusdpo_lib.batch.jobs import Job, is_complete, resolved, resources
from focusdpo_lib.batch.schedule import Node, Task, makespan

RETRIES = 3  # of a job whose worker or node was lost
# Whether Ray listens to other machines. (Despite its name it is asked on Linux, too; Ray resolves 127.0.0.1 else.)
CLUSTERS = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
ANSWER = 20  # seconds that a cluster has to answer
SLOW = "timed out during startup"  # in what Ray says then
STORE = 100_000_000  # bytes that Ray keeps for objects between tasks; ours are a few words
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # its coming default, which it announces at every start
    "RAY_worker_niceness": "0",  # else its workers step back (15) behind whatever else the machine does
}
QUIET = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}


def run_all(jobs: Sequence[Job]) -> int:
    """As `engines.run_all`."""
    try:
        ray = imported()
        with _connected(ray):
            nodes = _nodes(ray)
            _require_room(jobs, nodes)
            _require_sight(ray, jobs)
            return _Driver(ray, jobs, nodes).run()
    except EngineError as error:
        say(f"nothing was run: {error}")
        return 1


def imported() -> Any:
    """The library. EngineError where it is not installed."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    if "RAY_ADDRESS" not in os.environ:
        os.environ.setdefault(CLUSTERS, "0")
    try:
        import ray
    except ImportError:
        raise EngineError(
            "the engine ray needs the extra of that name: python -m pip install -e '.[ray]' (with uv: uv pip install)"
        ) from None
    return ray


@contextmanager
def _connected(ray: Any) -> Iterator[None]:
    """A connection to RAY_ADDRESS, or to a Ray of this machine alone that ends with it; one that is there is left."""
    if ray.is_initialized():
        yield
        return
    if address := os.environ.get("RAY_ADDRESS"):
        try:
            _require_answer(address)  # else Ray itself tries for minutes
            ray.init(address=address, **QUIET)
        except (OSError, ValueError, RuntimeError) as error:
            raise EngineError(
                f"the cluster at RAY_ADDRESS={address} cannot be joined ({str(error).splitlines()[0]}): start it, or "
                "correct the address"
            ) from None
    else:
        patiently(lambda: ray.init(address="local", object_store_memory=STORE, **QUIET))
    try:
        yield
    finally:
        ray.shutdown()


def _require_answer(address: str) -> None:
    """OSError where nothing listens at host:port (a name of Ray's own, such as auto, is not looked at)."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER).close()


def patiently(start: Callable[[], Any], tries: int = 3) -> Any:
    """Starts a Ray. It gives up whatever has not started within 30 seconds, from which a busy machine may keep it."""
    for left in reversed(range(tries)):
        try:
            return start()
        except Exception as error:  # it is of no other class
            if SLOW not in str(error):
                raise
            if not left:
                raise EngineError(f"Ray does not start here ({error}): end other work, and run again") from None


def _nodes(ray: Any) -> list[Node]:
    """What each machine has, in all."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(has.get("GPU", 0), has.get("CPU", 0), has.get("memory", 0) / 1e9) for has in alive]


def _require_room(jobs: Sequence[Job], nodes: Sequence[Node]) -> None:
    """EngineError for a job that no machine of the cluster can hold: it would wait for ever."""
    for job in jobs:
        needs = resources(job)
        if not any(node.holds(needs) for node in nodes):
            asks = f"{needs.gpus} GPU(s), {needs.cpus} CPU(s)" + (f" and {needs.memory:g} GB" if needs.memory else "")
            has = "; ".join(f"{n.gpus:g} GPU(s), {n.cpus:g} CPU(s), {n.memory:.0f} GB" for n in nodes)
            raise EngineError(
                f"{job.name} asks for {asks} on one machine, and the cluster's machines have {has}: lower resources in "
                f"{job.params or 'its settings'}, or --set resources.gpus={max(n.gpus for n in nodes):g}"
            )
        _require_group(job, needs.gpus, sum(node.gpus for node in nodes))


def _require_group(job: Job, own: int, gpus: float) -> None:
    """EngineError for a training in more processes than the run's `own` GPUs that cannot be the cluster's."""
    training = params.section("training", resolved(job).get("training"))
    if not training.processes or training.processes <= max(1, own) or not gpus:
        return
    if own:
        raise EngineError(
            f"{job.name} asks for {own} GPU(s) and trains in {training.processes} processes: set resources.gpus to "
            f"{training.processes} for one machine, or to 0, and the processes get GPUs all over the cluster"
        )
    if training.processes > gpus:
        raise EngineError(
            f"{job.name} trains in {training.processes} processes, and the cluster has {gpus:g} GPU(s): lower "
            "training.processes and raise training.gradient_accumulation by as much"
        )


def _require_sight(ray: Any, jobs: Sequence[Job]) -> None:
    """EngineError where a machine of the cluster does not see the results or has another package."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    folders = {job.folder.absolute().parent for job in jobs}
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(dir=next(iter(folders)), prefix=runs.PARTIAL) as token:
        look = ray.remote(num_cpus=0, max_retries=0)(_looks)
        seen = []
        for node in (node for node in ray.nodes() if node["Alive"]):
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            words = token.name, os.getcwd(), _package()
            seen.append((node["NodeManagerHostname"], look.options(scheduling_strategy=there).remote(*words)))
        for host, answer in seen:
            try:
                problem = ray.get(answer, timeout=120)
            except ray.exceptions.GetTimeoutError:
                problem = "does not answer within 2 minutes: look at its Ray"
            except ray.exceptions.RayError as error:  # the package is not there, so that the task cannot even be read
                problem = f"cannot run the kit ({str(error).splitlines()[-1]}): install it there too"
            if problem:
                raise EngineError(f"the machine {host} {problem}")


def _looks(token: str, cwd: str, package: str) -> str | None:
    """In a worker: what keeps this machine from running jobs, if anything."""
    if not Path(token).exists():
        return f"does not see {Path(token).parent}: put the results on a file system that all machines share"
    if not Path(cwd).is_dir():
        return f"does not see {cwd}: put the kit on a file system that all machines share"
    if _package() != package:
        return "has another focusdpo_lib or another Python than this one: install the same on both"
    return None


def _package() -> str:
    """A digest of the package's own code and of Python's version."""
    root = Path(__file__).parents[2]
    digest = hashlib.sha256(platform.python_version().encode())
    for file in sorted(root.rglob("*.py")):
        digest.update(file.relative_to(root).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()


class _Driver:
    """Submits every job at once, each behind those that it needs, and says what becomes of them."""

    def __init__(self, ray: Any, jobs: Sequence[Job], nodes: Sequence[Node]) -> None:
        self.ray, self.jobs, self.nodes = ray, list(jobs), nodes
        self.tasks = {job.name: Task(job.name, job.minutes, resources(job), job.after) for job in jobs}
        self.refs: dict[Any, Job] = {}
        self.begun: dict[str, float] = {}  # of what runs: when it began
        self.ended: set[str] = set()
        self.failed: set[str] = set()
        self.pace = [(2.0, 2.0)]  # minutes expected and taken
        self.warm = len(jobs) > sum(node.cpus for node in nodes)  # a worker runs more than one: its imports pay

    def run(self) -> int:
        by_name = {}
        for job in self.jobs:
            if all(name in self.ended for name in job.after) and is_complete(job):
                self.ended.add(job.name)
                self._say(job, "complete already, skipped")
                continue
            before = [by_name[name] for name in job.after if name in by_name]
            by_name[job.name] = self._submit(job, before)
            self.refs[by_name[job.name]] = job
        try:
            while self.refs:
                done, _ = self.ray.wait(list(self.refs), timeout=0.5)
                self._look_for_started()
                for ref in done:
                    self._end(ref, self.refs.pop(ref))
        except KeyboardInterrupt:
            for ref in self.refs:
                self.ray.cancel(ref, force=True)
            say("interrupted: run the same command again to go on; what is complete is kept")
            return 130
        return 1 if self.failed else 0

    def _submit(self, job: Job, before: Sequence[Any]) -> Any:
        needs = resources(job)
        memory = {} if needs.memory is None else {"memory": int(needs.memory * 1e9)}
        options = {"num_gpus": needs.gpus, "num_cpus": needs.cpus, "max_retries": RETRIES, "name": job.name, **memory}
        return self.ray.remote(**options)(_task).remote(orders(job, self.warm), *before)

    def _look_for_started(self) -> None:
        for job in [job for job in self.refs.values() if job.name not in self.begun]:
            if line := started(job):
                self.begun[job.name] = time.monotonic()
                self._say(job, f"{line}, about {self._left()} left")

    def _end(self, ref: Any, job: Job) -> None:
        try:
            ran = self.ray.get(ref)
        except self.ray.exceptions.RayError as error:
            if missing := self.failed.intersection(job.after):
                self._say(job, f"not run, for it needs {', '.join(sorted(missing))}")
            else:
                self._say(job, f"FAILED. {_reason(error)} (its log: {log_of(job)})")
            self.failed.add(job.name)
        else:
            taken = (time.monotonic() - self.begun.get(job.name, time.monotonic())) / 60
            self.pace += [(job.minutes, taken)] if ran else []
            self._say(job, f"done in {span(taken)}" if ran else "complete already, skipped")
        self.ended.add(job.name)
        self.begun.pop(job.name, None)

    def _left(self) -> str:
        """Until the last job ends, at the pace so far."""
        factor = sum(taken for _, taken in self.pace) / sum(expected for expected, _ in self.pace)
        tasks = [self.tasks[job.name] for job in self.refs.values()]
        now = time.monotonic()
        running = {name: (now - begun) / 60 / factor for name, begun in self.begun.items()}
        return span(makespan(tasks, self.nodes, running) * factor)

    def _say(self, job: Job, text: str) -> None:
        say(f"[{self.jobs.index(job) + 1}/{len(self.jobs)}] {job.name}: {text}")


def _task(words: Mapping[str, Any], *before: bool) -> bool:
    """In a worker: runs a job once those before it are done; says whether it ran."""
    import ray

    here, gpus = ray.get_runtime_context(), list(map(str, ray.get_gpu_ids()))
    os.environ[cluster.ADDRESS] = here.gcs_address
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)  # none, where it asked for none
    return work(**words, place=f"node {here.get_node_id()[:8]}, GPUs {', '.join(gpus) or 'none'}")


def _reason(error: Exception) -> str:
    """One sentence of what ended a task."""
    cause = getattr(error, "cause", None)
    if cause is not None:
        return " ".join(str(cause).split())
    return (
        f"its worker or node was lost {RETRIES + 1} times, most often for want of main memory: raise resources.memory, "
        "so that fewer runs share a machine"
    )
