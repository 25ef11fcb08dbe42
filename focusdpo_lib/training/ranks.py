"""What a cluster's job script leaves in the environment, and what the kit sets itself when it launches processes."""

import os
import re
from collections.abc import MutableMapping

# Read by torch.distributed, torchrun (PET_: its options, as Kubernetes' training operator sets them) and accelerate,
# the last also in the words of MPI.
OF_A_LAUNCHER = re.compile(
    r"((LOCAL_|GROUP_|ROLE_|NODE_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|(ACCELERATE|TORCHELASTIC)_.*"
    r"|(OMPI|MV2)_COMM_WORLD_.*|PMI_(RANK|SIZE)|PET_.*)"
)


def clear(environment: MutableMapping[str, str] = os.environ) -> None:
    """Takes these variables away and says so: with them one process would wait for others that never come."""
    left = sorted(name for name in environment if OF_A_LAUNCHER.fullmatch(name))
    for name in left:
        del environment[name]
    if left:
        print(f"{', '.join(left)} of another launcher are ignored: training.processes says how many processes train")
