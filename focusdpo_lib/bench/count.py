"""Full size without a GPU: a step's operations, and the bytes at its peak, counted on tensors without contents.

torch's fake tensors have shapes, dtypes and lifetimes: the same code runs, and what it holds is known at every moment.
Where a CPU would take other dtypes or keep other tensors than a GPU, the GPU's way is put in its place. Left out are
the kernels' workspaces, what the allocator loses, and CUDA's own context.
"""

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from focusdpo_lib import params
from focusdpo_lib.backbones import Backbone, SdxlIp
from focusdpo_lib.bench import models
from focusdpo_lib.bench.cases import Case
from focusdpo_lib.bench.measure import Operations, Task, operations
from focusdpo_lib.bench.steps import FLOOR, OBJECTIVES, optimizer_bytes, our_step, plain_step, winners_forward
from focusdpo_lib.training import draws

CPU, NOWHERE = torch.device("cpu"), torch.device("meta")
PACKED = {"nf4": (0.5, 64), "int8": (1, None)}  # bytes a weight, and weights to a float32 scale (None: a row's)
BLOCK = 512  # bytes: a GPU's allocator hands out multiples of it
# By a GPU's autocast and not by a CPU's, of what the models call; interpolate: SDXL doubles sizes by it.
IN_FLOAT32 = ("layer_norm", "group_norm", "rms_norm", "interpolate")


class LiveBytes(TorchDispatchMode):
    """The bytes of all storages that were made within this context and are still referred to, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return output

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = -(-storage.nbytes() // BLOCK) * BLOCK
            self.now += self.sizes[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.now -= self.sizes.pop(key)

    def peak_of(self, task: Task) -> int:
        """The most that is alive while a task runs, with all that was alive before it."""
        self.peak = self.now
        task()
        return self.peak


def _in_float32(function: Callable) -> Callable:
    def wrapped(*args, **kwargs):
        args = [x.float() if isinstance(x, torch.Tensor) else x for x in args]
        return function(*args, **{name: x.float() if isinstance(x, torch.Tensor) else x for name, x in kwargs.items()})

    return wrapped


def _fused_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """One kernel in bfloat16 that keeps its inputs, output and sums for the backward, as a GPU's does."""
    assert not enable_gqa, "no model here groups its queries"
    query, key, value = (x.bfloat16() for x in (query, key, value))
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Within this context a CPU's tensors take the dtypes that a GPU's autocast gives, and attention is one kernel."""
    functions = {name: _in_float32(getattr(F, name)) for name in IN_FLOAT32}
    with patch.multiple(F, scaled_dot_product_attention=_fused_attention, **functions):
        yield


@contextmanager
def without_contents() -> Iterator[LiveBytes]:
    """Within this context tensors have no contents: their bytes are counted, checks of their values find nothing."""
    found_nothing = {"any": lambda self: False, "nonzero": lambda self: torch.empty(0, 1, dtype=torch.long)}
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live, patch.multiple(torch.Tensor, **found_nothing):
        yield live


class PackedLinear(nn.Module):
    """What a linear layer of bitsandbytes holds: packed weights and scales; the matrix exists while it multiplies."""

    def __init__(self, linear: nn.Linear, weights: str) -> None:
        super().__init__()
        self.features, (size, block) = linear.weight.shape, PACKED[weights]
        self.keeps_input = weights == "int8"  # bitsandbytes holds on to it, though only the weights' gradient needs it
        self.bias = linear.bias
        self.register_buffer("packed", torch.empty(int(linear.weight.numel() * size), dtype=torch.uint8))
        scales = linear.weight.numel() // block if block else len(linear.weight)
        self.register_buffer("scales", torch.empty(scales))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return PackedProduct.apply(x.bfloat16(), self.bias, self.features, self.keeps_input)


class PackedProduct(torch.autograd.Function):
    """The product of an input with a matrix that is unpacked for it, in the forward and again in the backward."""

    @staticmethod
    def forward(ctx, x, bias, features, keeps_input):
        ctx.features = features
        ctx.save_for_backward(*[x] * keeps_input)
        return F.linear(x, x.new_empty(features), bias)

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ gradient.new_empty(ctx.features), None, None, None


def given_memory(backbone: Backbone, weights: str) -> Backbone:
    """Moves a network from nowhere to where its bytes count, and packs the layers of its base.

    An IP-Adapter's own keys and values come after quantization, and stay as they are.
    """
    backbone.network.to_empty(device=CPU)
    if isinstance(backbone, SdxlIp):
        backbone.resampler.to_empty(device=CPU)  # used by no step, but on the GPU
    backbone.device = CPU
    layers = {name: m for name, m in backbone.network.named_modules() if isinstance(m, nn.Linear)}
    packed = [name for name in layers if ".lora_" not in name and "_ip." not in name] if weights in PACKED else []
    for name in packed:
        parent, _, child = name.rpartition(".")
        outer = backbone.network.get_submodule(parent)
        setattr(outer, child, PackedLinear(layers[name], weights))
        if isinstance(outer, BaseTunerLayer):  # on bitsandbytes' layers peft leaves the dtype of its input to autocast
            outer.cast_input_dtype_enabled = False
    return backbone


def counted(case: Case, batch: int, scratch: Path) -> dict:
    """What `measure` says of a case, as far as it can be told without a GPU: bytes and operations, no seconds."""
    backbone = models.built(case, NOWHERE, scratch)
    twin = copy.deepcopy(backbone)
    backbone.add_adapter(params.Training().lora.rank)
    if case.checkpointing:
        backbone.network.enable_gradient_checkpointing()
    pairs = models.load_pairs(case, backbone, batch)
    draw = draws({case.references: pairs}, params.Training(batch_size=batch))(0)
    with without_contents() as live, as_on_a_gpu():
        backbone = given_memory(backbone, case.weights)
        weights_bytes = live.now
        forward = operations(winners_forward(backbone, pairs, draw, masked=False))
        tasks = {name: our_step(backbone, pairs, draw, name) for name in OBJECTIVES}
        steps = {name: _cost(task, backbone, live, forward * FLOOR[name]) for name, task in tasks.items()}
        twin = given_memory(twin, case.weights)
        plain = plain_step(backbone, twin, pairs, draw)
        steps["plain"] = _cost(plain, backbone, live, forward * FLOOR["plain"])
    ratios = {
        "operations, focusdpo / dpo": steps["focusdpo"]["operations"] / steps["dpo"]["operations"],
        "operations, plain / focusdpo": steps["plain"]["operations"] / steps["focusdpo"]["operations"],
        "bytes saved": steps["plain"]["peak_bytes"] - steps["focusdpo"]["peak_bytes"],
    }
    return {
        "status": "counted",
        "steps": steps,
        "ratios": ratios,
        "weights_bytes": weights_bytes,
        "optimizer_bytes": optimizer_bytes(backbone),
        "forward_operations": forward,
    }


def _cost(step: Task, backbone: Backbone, live: LiveBytes, floor: int) -> dict:
    for parameter in backbone.adapter_parameters():  # of the micro-batches before, where gradients are accumulated
        parameter.grad = torch.zeros_like(parameter)
    with Operations() as done:
        peak = live.peak_of(step)
    return {"peak_bytes": peak, "operations": done.total, "operations / floor": done.total / floor}
