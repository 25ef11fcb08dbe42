"""Work for several processes that takes no time: they import this file and nothing heavy."""

import errno
import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from focusdpo_lib.runs import RunError, atomic


@dataclass(frozen=True)
class Counting:
    """Work on twelve items, each a file with the process that made it; what happens at `fails` is `how`."""

    folder: Path
    fails: int | None = None
    how: str = "kill"  # once, always; raise

    def __call__(self, shard, progress):
        items = [i for i in range(12) if not (self.folder / str(i)).exists()]
        mine = [i for i in items if i % shard[1] == shard[0]]
        progress.expects(len(mine))
        for i in mine:
            progress.begins(f"item {i}")
            if i == self.fails:
                self._fail()
            (self.folder / str(i)).write_text(f"{os.getpid()} {os.environ.get('OMP_NUM_THREADS')}")
            progress.done(1)

    def _fail(self):
        if self.how == "raise":
            raise RunError(f"item {self.fails} is a hippo")
        if self.how == "once" and (self.folder / "died").exists():
            return
        (self.folder / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)


class Seen:
    """Work whose arrival in a process is when it looks for its GPU."""

    def __init__(self, folder):
        self.folder = folder

    def __setstate__(self, state):
        self.__dict__ = state | {"gpu": os.environ.get("CUDA_VISIBLE_DEVICES")}

    def __call__(self, shard, progress):
        (self.folder / str(shard[0])).write_text(self.gpu)


@dataclass(frozen=True)
class Sleeping:
    folder: str

    def __call__(self, shard, progress):
        partial = Path(self.folder) / f"new-{shard[0]}"
        partial.write_text(str(os.getpid()))
        partial.rename(Path(self.folder) / f"at-{shard[0]}")
        time.sleep(600)


@dataclass(frozen=True)
class OnGpu:
    """Work that says where it is done and when; told to, one shard kills its process the first time."""

    folder: Path
    kills: bool = False

    def __call__(self, shard, progress):
        progress.expects(1)
        progress.begins(f"shard {shard[0]}")
        if self.kills and shard[0] == 1 and not (self.folder / "died").exists():
            (self.folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        begun = time.time()
        time.sleep(2)
        import ray

        place = {"node": ray.get_runtime_context().get_node_id(), "gpus": os.environ["CUDA_VISIBLE_DEVICES"]}
        record = place | {"begun": begun, "ended": time.time(), "of": shard[1]}
        (self.folder / f"{shard[0]}.json").write_text(json.dumps(record))
        progress.done(1)


@dataclass(frozen=True)
class Steady:
    """Work on items, each a file of its own that takes `pause` seconds; at `full` the disk has no room, once."""

    folder: Path
    items: int = 30
    pause: float = 0.05
    full: int | None = None

    def __call__(self, shard, progress):
        todo = [i for i in range(shard[0], self.items, shard[1]) if not (self.folder / f"{i}.txt").exists()]
        progress.expects(len(todo))
        for i in todo:
            progress.begins(f"item {i}")
            time.sleep(self.pause)
            with atomic(self.folder / f"{i}.txt") as partial:
                partial.write_text(f"{i} " * 1000)
                if i == self.full and not (self.folder / "was full").exists():
                    (self.folder / "was full").touch()
                    raise OSError(errno.ENOSPC, "No space left on device")
            progress.done(1)
