"""Algorithm 1: preference training of an adapter, two passes a step, on accelerate.

The first pass, without gradients, goes through the reference model and yields the focus masks on its way (R4); the
second, with gradients, goes through the policy. Winner and loser are one batch in both. Every batch, noise and timestep
is a function of the seed and the step alone, so a killed run ends where an unbroken one does (to the bit where the
device's kernels are deterministic, as a CPU's are), and several processes compute what one with gradient accumulation
computes.
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from tqdm import tqdm

from focusdpo_lib import params
from focusdpo_lib.backbones import Backbone, Conditioning
from focusdpo_lib.dip.pair import REFERENCE_MASKS, DatasetError
from focusdpo_lib.masks import CorrespondenceTap, Focus, focus_field
from focusdpo_lib.objectives import Objective, errors_outside, flow_weight, patchdpo_loss, preference_loss, sft_loss
from focusdpo_lib.runs import atomic, require_space
from focusdpo_lib.training import ranks
from focusdpo_lib.training.checkpoints import CHECKPOINT, LOG, append_log, cut_log, held, resume, save_checkpoint
from focusdpo_lib.training.pairs import PreparedPairs
from focusdpo_lib.training.signs import failure_signs, flat_detail

ADAPTER = "adapter"


class TrainingError(RuntimeError):
    """Training cannot start or go on; the message says what, where and what to do."""


@dataclass(frozen=True)
class Draw:
    """What one step draws: rows of the prepared pairs with `count` references, noise (B, C, h, w) and t (B,).

    `view_noise` is that of the references, where the network looks at them too (R7).
    """

    count: int
    rows: torch.Tensor
    noise: torch.Tensor
    t: torch.Tensor
    view_noise: tuple[torch.Tensor, ...] = ()

    def part(self, start: int, stop: int) -> "Draw":
        views = tuple(noise[start:stop] for noise in self.view_noise)
        return Draw(self.count, self.rows[start:stop], self.noise[start:stop], self.t[start:stop], views)


def generator(*key: int) -> torch.Generator:
    """A CPU generator that depends on every number of the key."""
    state = 0
    for number in key:
        state = (state * 1_000_003 + number + 1) % (2**63)
    return torch.Generator().manual_seed(state)


def draw_timesteps(kind: str, count: int, source: torch.Generator, shift: float = 1.0) -> torch.Tensor:
    """`count` flow times in (0, 1] (R15): uniform; UNO's shifted ones, s u / (1 + (s − 1) u); or logit-normal."""
    if kind == "logit_normal":
        return torch.sigmoid(torch.randn(count, generator=source))
    uniform = 1 - torch.rand(count, generator=source)
    return shift * uniform / (1 + (shift - 1) * uniform) if kind == "uno_shift" else uniform


def draws(
    data: dict[int, PreparedPairs], settings: params.Training, processes: int = 1, shift: float = 1.0
) -> Callable[[int], Draw]:
    """A function from the step to what it draws, for all processes together.

    A step's pairs share their number of references. An epoch passes over every pair once, but for what does not fill a
    batch. Raises TrainingError if the pairs of one kind do not fill a single batch.
    """
    size = settings.batch_size * settings.gradient_accumulation * processes
    for count, pairs in data.items():
        if len(pairs) < size:
            raise TrainingError(
                f"a step takes {size} pairs, but only {len(pairs)} with {count} reference(s) are in the dataset: lower "
                "training.batch_size or training.gradient_accumulation, or build more pairs"
            )
    epochs: dict[int, list[tuple[int, torch.Tensor]]] = {}

    def epoch(number: int) -> list[tuple[int, torch.Tensor]]:
        if number not in epochs:
            source = generator(settings.seed, 1, number)
            batches = []
            for count, pairs in sorted(data.items()):
                order = torch.randperm(len(pairs), generator=source)
                batches += [(count, rows) for rows in order.split(size) if len(rows) == size]
            order = torch.randperm(len(batches), generator=source)
            epochs.clear()
            epochs[number] = [batches[i] for i in order]
        return epochs[number]

    a_pass = sum(len(pairs) // size for pairs in data.values())

    def at(step: int) -> Draw:
        count, rows = epoch(step // a_pass)[step % a_pass]
        source = generator(settings.seed, 2, step)
        noise = torch.randn(size, *data[count].win.shape[1:], generator=source)
        t = draw_timesteps(settings.timesteps, size, source, shift)
        return Draw(count, rows, noise, t, draw_view_noise(data[count].conditioning, size, source))

    return at


def draw_view_noise(conditioning: Conditioning, count: int, source: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Noise for `count` samples of each view of a reference."""
    return tuple(torch.randn(count, *view.latents.shape[1:], generator=source) for view in conditioning.views)


def noised_views(
    backbone: Backbone, conditioning: Conditioning, noise: Sequence[torch.Tensor], t: torch.Tensor
) -> Conditioning:
    """The conditioning whose views are noised as far as the target is, t (B,), each with noise of its own."""
    views = zip(conditioning.views, noise, strict=True)
    views = tuple(v._replace(latents=backbone.noised(v.latents, n.to(t.device), t)) for v, n in views)
    return replace(conditioning, views=views)


def focus_masks(
    backbone: Backbone, tap: CorrespondenceTap, pairs: PreparedPairs, rows: torch.Tensor, settings: params.Masks
) -> Focus:
    """COMPUTEMASKS and steps 2–3 of Algorithm 1, from a tap that watched the winners of `rows`."""
    return focus_field(
        tap.result(),
        pairs.prior_tokens[rows].to(backbone.device),
        pairs.detail[rows].to(backbone.device),
        pairs.token_grid,
        multi_subject=settings.multi_subject,
        tau=settings.tau,
        gamma=settings.gamma,
    )


def new_tap(backbone: Backbone, settings: params.Masks, pairs: PreparedPairs, rows: torch.Tensor) -> CorrespondenceTap:
    """A tap on the layers that the settings name and on the winners of `rows`, the first samples of a batch.

    Raises DatasetError where the settings need masks of the references and the pairs have none.
    """
    layers, cover = backbone.attention_layers(settings.layers), None
    if settings.pool == "subject":
        if not pairs.cover:
            raise DatasetError(
                f"the pair {pairs.ids[0]} and those with it lack {REFERENCE_MASKS}, which say where each reference "
                "shows its subject: add them, or set masks.pool to all"
            )
        cover = [cover[rows].to(backbone.device) for cover in pairs.cover]
    winners = slice(0, len(rows))
    return CorrespondenceTap(
        layers, settings.similarity, winners, pairs.token_grid, settings.features, cover, settings.reference_tokens
    )


def step_objective(
    backbone: Backbone, pairs: PreparedPairs, draw: Draw, objective: params.Objective, masks: params.Masks
) -> tuple[Objective, Focus | None]:
    """The loss of one batch under the policy, and the masks that weighted it (FocusDPO only)."""
    device, b = backbone.device, len(draw.rows)
    noise, t = draw.noise.to(device), draw.t.to(device)
    win, lose = pairs.win[draw.rows].to(device), pairs.lose[draw.rows].to(device)
    known = pairs.conditioning if objective.name == "focusdpo" else replace(pairs.conditioning, views=())
    condition = known[draw.rows].to(device)  # only masks look at the views: nothing else carries them to the device
    weight = flow_weight(t, objective.flow_weight) if backbone.predicts == "velocity" else None
    target_win, target_lose = backbone.target(win, noise, t), backbone.target(lose, noise, t)
    noised_win = backbone.noised(win, noise, t)
    if objective.name == "sft":
        return sft_loss(backbone.predict(noised_win, t, condition), target_win, weight=weight), None

    noised, both_t, both = torch.cat([noised_win, backbone.noised(lose, noise, t)]), t.repeat(2), condition.twice()
    if objective.name == "patchdpo":  # the winner stands for the real image, the loser for the generated one
        policy = backbone.predict(noised, both_t, both)
        maps = pairs.quality[draw.rows].to(device).unbind(1)
        loss = patchdpo_loss(policy[:b], policy[b:], target_win, target_lose, *maps, weight=weight)
        return loss, None

    tap = None
    if objective.name == "focusdpo":
        tap, both = new_tap(backbone, masks, pairs, draw.rows), noised_views(backbone, both, draw.view_noise, t)
    of_reference = masks.network == "reference"
    with torch.no_grad(), backbone.reference_model():
        reference = backbone.predict(noised, both_t, both, taps=tap if of_reference else None)
    policy = backbone.predict(noised, both_t, both, taps=None if of_reference else tap)
    focus = None if tap is None else focus_masks(backbone, tap, pairs, draw.rows, masks)
    loss = preference_loss(
        policy[:b],
        policy[b:],
        reference[:b],
        reference[b:],
        target_win,
        target_lose,
        None if focus is None else focus.focus,
        beta=objective.beta,
        mask_power=objective.mask_power,
        reduction=objective.reduction,
        weight=weight,
    )
    if focus is not None:
        drift = errors_outside(policy[:b], reference[:b], target_win, focus.focus)
        loss = loss._replace(parts=loss.parts | drift)
    return loss, focus


def log_rows(
    step: int, pairs: PreparedPairs, draw: Draw, loss: Objective, focus: Focus | None, tau: float
) -> list[dict]:
    """What the log keeps of a step: one dict a pair; errors are weighted as they enter the loss, but those outside M.

    Everything is per pair, with its t, so that any share or mean can be taken by timestep bin as well as by step.
    """
    columns = {"t": draw.t, "margin": loss.margin, "accuracy": loss.accuracy, **loss.parts}
    if focus is not None:
        columns |= {name: getattr(focus, name) for name in ("coverage", "hit", "confusion", "chance")}
    values = {name: value.tolist() for name, value in columns.items() if value is not None}
    rows = []
    for i, row in enumerate(draw.rows.tolist()):
        entry = {"step": step, "pair": pairs.ids[row], "references": draw.count, "loss": loss.loss.item()}
        entry |= {name: round(value[i], 8) for name, value in values.items()}
        if focus is not None:
            # Compared as Eq. 9 does, in fp32: as Python floats a coverage of exactly τ would look larger.
            entry["branch"] = "structure" if focus.coverage[i] > tau else "fused"
        rows.append(entry)
    return rows


def new_optimizer(weights: Sequence[nn.Parameter], training: params.Training) -> torch.optim.Optimizer:
    """AdamW, its state in float32 or in 8 bits. Raises TrainingError where bitsandbytes is not installed."""
    settings = {"lr": training.learning_rate, "weight_decay": training.weight_decay}
    if training.optimizer == "adamw":
        return torch.optim.AdamW(weights, **settings)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise TrainingError("training.optimizer adamw_8bit needs bitsandbytes: install the extra [quantized]") from None
    return AdamW8bit(weights, **settings)


def train(
    backbone: Backbone,
    data: dict[int, PreparedPairs],
    folder: Path,
    *,
    objective: params.Objective,
    masks: params.Masks,
    training: params.Training,
    accelerator: Accelerator | None = None,
    stop_after: int | None = None,
) -> Path:
    """Trains the backbone's adapter on prepared pairs; returns the folder of the adapter.

    Without an `accelerator` it trains alone, whatever ranks a job script has left in the environment. Goes on from the
    checkpoint in `folder` where there is one. `stop_after` ends the run early, at that step, as a kill would. Raises
    TrainingError when the loss or a gradient is not a number, naming the pairs; the checkpoint stays.
    """
    folder = Path(folder)
    if accelerator is None:
        ranks.clear()
        accelerator = Accelerator(cpu=backbone.device.type == "cpu")
    with held(folder) if accelerator.is_main_process else nullcontext():
        return _train(backbone, data, folder, objective, masks, training, accelerator, stop_after)


def _train(backbone, data, folder, objective, masks, training, accelerator, stop_after) -> Path:
    if objective.name == "patchdpo" and any(pairs.quality is None for pairs in data.values()):
        raise TrainingError("PatchDPO needs patch qualities: prepare the pairs with a vision encoder (patches=…)")
    if objective.name == "focusdpo" and masks.pool == "subject" and not all(pairs.cover for pairs in data.values()):
        raise TrainingError("the prepared pairs have no reference masks: prepare them with masks.pool subject")
    if backbone.precision == torch.float16 and objective.reduction == "sum":
        raise TrainingError(
            "float16 cannot hold the gradients of a sum: set objective.reduction to mean, or use bfloat16"
        )
    backbone.add_adapter(training.lora.rank, training.lora.alpha, training.lora.targets, seed=training.seed)
    if training.gradient_checkpointing:  # recomputed in the backward pass, after reference_model() has been left
        backbone.network.enable_gradient_checkpointing()
    if training.compile:
        backbone.network.compile_repeated_blocks()
    weights = backbone.adapter_parameters()
    optimizer = new_optimizer(weights, training)
    first = resume(folder, weights, optimizer)
    if accelerator.is_main_process and first < training.steps:
        states = 7 * sum(
            weight.nbytes for weight in weights
        )  # weights and Adam's two moments, twice while one replaces
        require_space(folder, states, "checkpoint and adapter")  # the other, and the adapter
    if accelerator.is_main_process:
        cut_log(folder, first)
        warn = _Warnings(folder, data if objective.name == "focusdpo" else {})
    at = draws(data, training, accelerator.num_processes, backbone.timestep_shift(next(iter(data.values())).win.shape))
    last = min(training.steps, stop_after or training.steps)
    for step in tqdm(range(first, last), initial=first, total=training.steps, unit="step", mininterval=5, ncols=90,
                     file=sys.stdout, desc=objective.name, disable=not accelerator.is_main_process):  # fmt: skip
        draw = at(step)
        with _checkpoint_is_said(folder):
            entries = _gradients(backbone, data[draw.count], draw, step, objective, masks, training, accelerator)
            norm = _update(weights, optimizer, training, step, accelerator, _loss_scale(backbone))
            _require_finite(norm, "gradient", step, data[draw.count], draw.rows)
        if accelerator.is_main_process:
            append_log(folder, entries)
            if (step + 1) % training.checkpoint_every == 0 or step + 1 == training.steps:
                warn()
            if (step + 1) % training.checkpoint_every == 0 and step + 1 < training.steps:
                save_checkpoint(folder, step + 1, weights, optimizer)
    if accelerator.is_main_process and last == training.steps:
        with atomic(folder / ADAPTER) as partial:
            backbone.save_adapter(partial)
    accelerator.wait_for_everyone()
    return folder / ADAPTER


class _Warnings:
    """Prints a line for each failure sign of the run in `folder`, once."""

    def __init__(self, folder: Path, data: dict[int, PreparedPairs]):
        self.log, self.said = folder / LOG, set()
        self.flat = flat_detail(data) if data else None

    def __call__(self) -> None:
        signs = [*failure_signs(pd.read_csv(self.log)), *([self.flat] if self.flat else [])]
        for sign in signs:
            if sign.split(":")[0] not in self.said:
                tqdm.write(f"warning: {sign}", file=sys.stdout)
                self.said.add(sign.split(":")[0])


def _gradients(backbone, pairs, draw, step, objective, masks, training, accelerator: Accelerator) -> list[dict]:
    """Gradients of this process's share of a step, accumulated; returns the log rows of all processes."""
    entries, share = [], training.batch_size * training.gradient_accumulation
    begin = accelerator.process_index * share
    for start in range(begin, begin + share, training.batch_size):
        part = draw.part(start, start + training.batch_size)
        loss, focus = step_objective(backbone, pairs, part, objective, masks)
        _require_finite(loss.loss, "loss", step, pairs, part.rows)
        (loss.loss * _loss_scale(backbone) / training.gradient_accumulation).backward()
        entries += log_rows(step, pairs, part, loss, focus, masks.tau)
    return gather_object(entries) if accelerator.num_processes > 1 else entries


def _loss_scale(backbone: Backbone) -> float:
    """float16 cannot hold gradients as small as a mean over an image's: they are scaled on their way, a power of 2."""
    return 2.0**12 if backbone.precision == torch.float16 else 1.0


def _update(
    weights: Sequence[nn.Parameter],
    optimizer,
    training: params.Training,
    step: int,
    accelerator: Accelerator,
    loss_scale: float = 1.0,
) -> torch.Tensor:
    """One optimizer step on the mean of all processes' gradients; returns their norm before clipping.

    LoRA's gradients are few, so they travel as one vector.
    """
    for weight in weights if loss_scale != 1.0 else ():
        weight.grad.div_(loss_scale)
    if accelerator.num_processes > 1:
        together = torch.cat([w.grad.flatten() for w in weights])
        together = accelerator.reduce(together, reduction="mean")
        for weight, gradient in zip(weights, together.split([w.numel() for w in weights]), strict=True):
            weight.grad.copy_(gradient.view_as(weight))
    norm = nn.utils.clip_grad_norm_(weights, training.max_grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = training.learning_rate * min(1.0, (step + 1) / max(1, training.warmup_steps))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def _require_finite(value: torch.Tensor, what: str, step: int, pairs: PreparedPairs, rows: torch.Tensor) -> None:
    if not torch.isfinite(value):
        names = ", ".join(pairs.ids[row] for row in rows.tolist())
        remedy = (
            "lower training.learning_rate" if step else "set backbone.precision to float32"
        )  # untrained: no rate yet
        raise TrainingError(
            f"the {what} of step {step} is {value.item()} on the pairs {names}: look at them or {remedy}"
        )


@contextmanager
def _checkpoint_is_said(folder: Path):
    """Within this context a TrainingError also says that the checkpoint stays, where there is one."""
    try:
        yield
    except TrainingError as error:
        if (folder / CHECKPOINT).is_file():
            raise TrainingError(f"{error}; the last checkpoint is kept, and the run goes on from it") from None
        raise
