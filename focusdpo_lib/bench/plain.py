"""A plain reading of the paper, to be faster and smaller than; nothing but the benchmark uses it.

Diffusion-DPO as it is usually written, with ComputeMasks (Algorithm 1) as a call of its own: a second copy of the
weights is the reference model, winner and loser go through each model one after the other, and the masks cost one more
forward. The loss is `step_objective`'s.
"""

import copy

import torch

from focusdpo_lib import params
from focusdpo_lib.backbones import Backbone
from focusdpo_lib.backbones.family import ADAPTER
from focusdpo_lib.objectives import Objective, flow_weight, preference_loss
from focusdpo_lib.training import Draw, focus_masks, new_tap, noised_views
from focusdpo_lib.training.pairs import PreparedPairs


def reference_copy(backbone: Backbone) -> Backbone:
    """The reference model as a second copy of the weights, without our adapter."""
    twin = copy.deepcopy(backbone)
    twin.network.delete_adapters(ADAPTER)
    return twin


def plain_objective(
    backbone: Backbone,
    reference: Backbone,
    pairs: PreparedPairs,
    draw: Draw,
    objective: params.Objective,
    masks: params.Masks,
) -> Objective:
    """FocusDPO's loss of one batch from five forwards: masks; reference and policy, on winner and loser each."""
    device = backbone.device
    noise, t = draw.noise.to(device), draw.t.to(device)
    images = [x[draw.rows].to(device) for x in (pairs.win, pairs.lose)]
    condition = pairs.conditioning[draw.rows].to(device)
    noised = [backbone.noised(image, noise, t) for image in images]
    tap, seen = new_tap(backbone, masks, pairs, draw.rows), noised_views(backbone, condition, draw.view_noise, t)
    with torch.no_grad():
        (reference if masks.network == "reference" else backbone).predict(noised[0], t, seen, taps=tap)
        frozen = [reference.predict(x, t, condition) for x in noised]
    policy = [backbone.predict(x, t, condition) for x in noised]
    return preference_loss(
        *policy,
        *frozen,
        *(backbone.target(image, noise, t) for image in images),
        focus_masks(backbone, tap, pairs, draw.rows, masks).focus,
        beta=objective.beta,
        mask_power=objective.mask_power,
        reduction=objective.reduction,
        weight=flow_weight(t, objective.flow_weight) if backbone.predicts == "velocity" else None,
    )
