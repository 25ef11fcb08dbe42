"""A training small enough for a test: pairs, settings, and how to run it in processes that a test can kill."""

import copy
import os
from functools import cache
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from focusdpo_lib import backbones, params
from focusdpo_lib.backbones import BackboneError
from focusdpo_lib.dip import toybox
from focusdpo_lib.dip.dataset import Pair
from focusdpo_lib.training import ADAPTER, train
from focusdpo_lib.training.pairs import PreparedPairs, prepare

TRAINING = {"batch_size": 2, "learning_rate": 1e-2, "warmup_steps": 0, "lora": {"rank": 2}}


def tiny_pairs(each: int = 8) -> list[Pair]:
    """`each` training pairs with one subject and as many with two, in turn."""
    single = [toybox.make_pair(params.Dip(two_subject_share=0.0), "train", i) for i in range(0, 2 * each, 2)]
    double = [toybox.make_pair(params.Dip(two_subject_share=1.0), "train", i) for i in range(1, 2 * each, 2)]
    return [pair for pairs in zip(single, double, strict=True) for pair in pairs]


def load_tiny(model: Path, **settings):
    return backbones.load(params.section("backbone", {"model": str(model), "precision": "float32"} | settings))


_loaded = cache(backbones.load)


def another(settings: params.Backbone, parts: str = "all"):
    """What `backbones.load` gives, where not loading is tested: a copy takes a third of its time."""
    return copy.deepcopy(_loaded(settings, parts=parts))


def refusal(**settings) -> str:
    """What `backbones.load` says, in one line, of a backbone that it refuses."""
    with pytest.raises(BackboneError) as caught:
        backbones.load(params.Backbone(**settings))
    message = str(caught.value)
    assert "\n" not in message
    return message


def tiny_train(model: Path, data: dict[int, PreparedPairs], folder: Path, objective="focusdpo", masks=None, **settings):
    """`train` on a fresh backbone from the tiny settings; returns the backbone."""
    backbone = another(params.Backbone(model=str(model), precision="float32"))
    stop_after, accelerator = settings.pop("stop_after", None), settings.pop("accelerator", None)
    train(
        backbone,
        data,
        folder,
        objective=params.section("objective", objective if isinstance(objective, dict) else {"name": objective}),
        masks=params.section("masks", masks),
        training=params.section("training", TRAINING | settings),
        accelerator=accelerator,
        stop_after=stop_after,
    )
    return backbone


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    """The weights that the training run in `folder` ended with."""
    return load_file(folder / ADAPTER / "pytorch_lora_weights.safetensors")


def assert_same_weights(run: Path, other: Path, exactly: bool = True) -> None:
    ours, theirs = adapter(run), adapter(other)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        same = torch.equal(weight, theirs[name]) if exactly else torch.allclose(weight, theirs[name], atol=1e-6)
        assert same, name


def child_train(model: Path, folder: Path, settings: dict, rank: int = 0, processes: int = 1, port: int = 0) -> None:
    """`tiny_train` in a process of its own, alone or as one of several that accelerate launched."""
    torch.set_num_threads(1)
    if processes > 1:
        os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{processes}"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
    prepared = prepare(load_tiny(model), tiny_pairs(), params.Masks())  # before accelerate sets threads of its own
    launched = {"accelerator": Accelerator(cpu=True)} if processes > 1 else {}
    torch.set_num_threads(1)  # accelerate chooses another number, and sums take another order
    tiny_train(model, prepared, folder, **settings, **launched)
