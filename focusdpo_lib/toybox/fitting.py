"""The one training loop of the toybox recipe: resumable, and the same to the bit whether or not it was interrupted."""

import json
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import nn

from focusdpo_lib.runs import atomic

DECAY_FROM = 0.5


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100, decay_from: float = DECAY_FROM) -> float:
    """Linear warm-up, a plateau, then half a cosine down to zero over the last 1 − decay_from of the steps."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = max(0.0, step / steps - decay_from) / (1 - decay_from)
    return peak * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def sound_backward() -> AbstractContextManager:
    """Within this context a backward pass does without oneDNN where it may crash: on a processor without AVX-512.

    The gradient of a 1×1 convolution with a stride reads out of bounds there (torch 2.14.1, brgconv_strided:avx2), and
    the reader's residual blocks have such.
    """
    older = torch.backends.cpu.get_cpu_capability() in ("AVX2", "DEFAULT")
    return torch.backends.mkldnn.flags(enabled=False) if older else nullcontext()


def fit(
    name: str,
    modules: nn.ModuleDict,
    optimizers: list[torch.optim.Optimizer],
    loss_at: Callable[[int], tuple[torch.Tensor, dict[str, float]]],
    steps: int,
    folder: Path,
    *,
    after_step: Callable[[int], None] | None = None,
    save_every_s: float = 120.0,
    log_every: int = 50,
    clip: float = 1.0,
    decay_from: float = DECAY_FROM,
) -> list[dict]:
    """Minimises `loss_at(step)` over `steps` steps and returns the training curve.

    The learning rate falls from its plateau over the last 1 − `decay_from` of the steps.

    `loss_at` must draw its batch and noise from a generator seeded by the step, so that a resumed run repeats what an
    unbroken one does. A checkpoint (weights, optimizers, curve) is replaced whole every `save_every_s` seconds in
    `folder/name.checkpoint`; a finished fit leaves it there and returns at once the next time. A checkpoint of another
    number of steps serves while both runs are on the plateau of the learning rate, where they are the same; later it
    raises ValueError. RuntimeError when the loss is not a number; the checkpoint stays.
    """
    path = Path(folder) / f"{name}.checkpoint"
    start, curve = _load(path, steps, decay_from, modules, optimizers) if path.exists() else (0, [])
    parameters = [p for p in modules.parameters() if p.requires_grad]
    running: dict[str, list[float]] = {}
    begun = saved_at = time.monotonic()
    for step in range(start, steps):
        _schedule(optimizers, step, steps, decay_from)
        loss, facts = loss_at(step)
        with sound_backward():
            loss.backward()
        nn.utils.clip_grad_norm_(parameters, clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if after_step is not None:
            after_step(step)
        for key, value in {"loss": loss.item(), **facts}.items():
            running.setdefault(key, []).append(value)
        if not math.isfinite(running["loss"][-1]):
            raise RuntimeError(f"the loss of {name} is {loss.item()} at step {step}: lower its rate; {path} is kept")
        if (step + 1) % log_every == 0:
            curve.append({"step": step + 1, **{key: round(sum(v) / len(v), 6) for key, v in running.items()}})
            pace = (time.monotonic() - begun) / (step + 1 - start)
            print(name, curve[-1], f"{pace:.3f} s/step, {(steps - step - 1) * pace / 60:.0f} min left", flush=True)
            running = {}
            if time.monotonic() - saved_at > save_every_s:
                _save(path, step + 1, steps, modules, optimizers, curve)
                saved_at = time.monotonic()
    if start < steps:
        _save(path, steps, steps, modules, optimizers, curve)
    return curve


def _schedule(optimizers: list[torch.optim.Optimizer], step: int, steps: int, decay_from: float) -> None:
    """Sets every group's learning rate; its peak is what the optimizer was made with."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, group.setdefault("peak", group["lr"]), decay_from=decay_from)


def _save(path: Path, step: int, steps: int, modules: nn.ModuleDict, optimizers: list, curve: list[dict]) -> None:
    state = {
        "step": step,
        "steps": steps,
        "modules": modules.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "curve": json.dumps(curve),
    }
    with atomic(path) as partial:
        torch.save(state, partial)


def _load(
    path: Path, steps: int, decay_from: float, modules: nn.ModuleDict, optimizers: list
) -> tuple[int, list[dict]]:
    """Puts a checkpoint into modules and optimizers; returns its step and curve."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state["steps"] != steps and state["step"] > decay_from * min(steps, state["steps"]):
        raise ValueError(
            f"{path} holds a run of {state['steps']} steps, not {steps}, whose learning rate has begun to fall: "
            "delete it to start anew"
        )
    modules.load_state_dict(state["modules"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state["step"], json.loads(state["curve"])
