"""The instruments: seconds in turns, operations counted, bytes at the peak, and the device's matrix rate."""

import gc
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import accumulate
from unittest.mock import patch

import torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, shape_wrapper

Task = Callable[[], None]


def interleaved(tasks: dict[str, Task], rounds: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Seconds of every task in every round after the warm-up, each round in another order.

    A machine that slows down slows them all, so that ratios of medians hold where seconds drift; and orders are drawn,
    so that no task always comes after the same one.
    """
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    source = random.Random(0)
    for k in range(rounds + warm_up):
        for name in source.sample(list(tasks), len(tasks)):
            taken = timed(tasks[name])
            if k >= warm_up:
                seconds[name].append(taken)
    return seconds


def timed(task: Task) -> float:
    """Seconds from start to end of what a task does, on the GPU too."""
    begun = time.perf_counter()
    task()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def matrix_rate(device: torch.device, dtype: torch.dtype, side: int | None = None, trials: int = 8) -> float:
    """Operations a second of a square matrix product, two for every multiply-add: the best of several trials.

    The side is 8192 on a GPU and 1024 on a CPU: large enough to be limited by arithmetic alone. Of one product alone
    where that takes long already, as in bfloat16 on a processor that has no instructions for it.
    """
    side = side or (8192 if device.type == "cuda" else 1024)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    if device.type == "cpu" and timed(lambda: a @ b) > 0.5:
        repeats, trials = 1, 1
    else:
        repeats = 10

    def products():
        for _ in range(repeats):
            a @ b

    return repeats * 2 * side**3 / min(timed(products) for _ in range(trials))


# --- operations --------------------------------------------------------------------------------------------------


def attention_operations(query, key, *_, **__) -> int:
    """Scores and weighted sum: two products of (B, H, P, d) queries with (B, H, P', d) keys or values."""
    return 4 * math.prod(query) * key[2]


def attention_backward_operations(gradient, query, key, *_, **__) -> int:
    """Five products, as torch counts every fused kernel: the scores once more, and four gradients."""
    return 10 * math.prod(query) * key[2]


CPU_ATTENTION = {  # torch knows the fused kernels of a GPU only
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_operations,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_operations,
}
FORMULAS = flop_registry | {kernel: shape_wrapper(formula) for kernel, formula in CPU_ATTENTION.items()}


class Operations(TorchDispatchMode):
    """Floating-point operations within this context: matrix products, convolutions, attention, forward and backward.

    By torch's formulas, as its FlopCounterMode counts; but that follows every module and so holds on to tensors, whose
    bytes could not be counted in the same pass. A multiply-add is two. Everything else (norms, activations, the masks'
    cosines) is left out, as it is by every count of this kind: it moves memory and does little arithmetic. What
    gradient checkpointing computes twice counts twice. Raises RuntimeError in `torch.inference_mode`: a linear layer
    comes whole there, and its product would not be seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if torch.is_inference_mode_enabled():
            raise RuntimeError("no operations can be counted in torch.inference_mode: use torch.no_grad")
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        if formula := FORMULAS.get(function.overloadpacket):
            self.total += formula(*args, **kwargs, out_val=output)
        return output


def operations(task: Task, *networks: nn.Module) -> int:
    """The `Operations` of what a task does; `networks` are all whose layers may be quantized."""
    with _plain_matrices(*networks), Operations() as counted:
        task()
    return counted.total


@contextmanager
def _plain_matrices(*networks: nn.Module) -> Iterator[None]:
    """Quantized matrices multiply as plain ones of their shape: the kernels of bitsandbytes are not seen by a counter.

    The product's numbers are nonsense, its operations are not.
    """
    linear = [m for network in networks for m in network.modules() if isinstance(m, nn.Linear)]
    with ExitStack() as stack:
        for module in linear:
            if not module.weight.dtype.is_floating_point:
                product = partial(_product_with_zeros, features=module.out_features)
                stack.enter_context(patch.object(module, "forward", product))
        yield


def _product_with_zeros(x: torch.Tensor, features: int) -> torch.Tensor:
    return F.linear(x, x.new_zeros(features, x.shape[-1]))


# --- memory ------------------------------------------------------------------------------------------------------


def held_bytes(*networks: nn.Module) -> int:
    """Bytes of all weights and buffers."""
    tensors = [x for network in networks for x in (*network.parameters(), *network.buffers())]
    return sum(x.numel() * x.element_size() for x in tensors)


def peak_bytes(task: Task, *networks: nn.Module) -> int:
    """The most memory that weights and everything a task allocates take at one time.

    On a GPU all that torch holds there, by its own account. On a CPU the bytes of the networks' weights and, on top,
    the peak of what the allocator reports to have handed out and not got back while the task ran.
    """
    if next(networks[0].parameters()).device.type == "cuda":
        release()
        torch.cuda.reset_peak_memory_stats()
        task()
        return torch.cuda.max_memory_allocated()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it complains that there is no GPU
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        task()
    reports = [e for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [report.nbytes() for report in sorted(reports, key=lambda report: report.start_ns())]
    return held_bytes(*networks) + max(accumulate(changes), default=0)


def release() -> None:
    """Gives back what nobody refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
