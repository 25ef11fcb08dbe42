"""Real models of tiny size with random weights, loaded as published ones are, and pairs to train on."""

import pytest
import torch
from tiny_training import another, load_tiny, tiny_pairs
from transformers import ViTConfig, ViTModel

from focusdpo_lib import params
from focusdpo_lib.evaluation.encoders import DinoEncoder
from focusdpo_lib.toybox.pipelines import build_autoencoder, build_flux
from focusdpo_lib.training.pairs import prepare

SIZES = {"heads": 2, "head_dim": 16, "double_blocks": 2, "single_blocks": 2, "text_dim": 16}

torch.set_num_threads(1)  # tensors this small only lose time to threads, and sums keep one order


def build_tiny_flux(**changes):
    torch.manual_seed(0)
    vae = build_autoencoder((8, 8, 8))
    vae.register_to_config(shift_factor=0.1, scaling_factor=0.5)
    return build_flux(vae, **SIZES | changes)


@pytest.fixture(scope="session")
def tiny_flux(tmp_path_factory):
    """A FLUX pipeline folder: 2 double and 2 single blocks, stride 4, 64×64 pixels are 8×8 tokens."""
    folder = tmp_path_factory.mktemp("models") / "flux_uno"
    build_tiny_flux().save_pretrained(folder)
    return folder


@pytest.fixture
def backbone(tiny_flux):
    return another(params.Backbone(model=str(tiny_flux), precision="float32"))


@pytest.fixture(scope="session")
def vit(tmp_path_factory):
    """The folder of a tiny ViT, whose patches PatchDPO's maps compare."""
    folder = tmp_path_factory.mktemp("models") / "vit"
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    ViTModel(ViTConfig(image_size=32, patch_size=8, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def patches(vit):
    return DinoEncoder(str(vit)).patches


@pytest.fixture(scope="session")
def pairs():
    """16 training pairs: 8 with one subject and 8 with two."""
    return tiny_pairs()


@pytest.fixture(scope="session")
def prepared(tiny_flux, pairs, patches):
    return prepare(load_tiny(tiny_flux), pairs, params.Masks(), patches=patches)


@pytest.fixture
def bitsandbytes_on_cpu(monkeypatch):
    """bitsandbytes computes on a CPU, but diffusers lets it only where there is a GPU: the guard is lifted.

    Its packed CPU format is for inference alone, and is taken by a frozen model in evaluation mode: it is kept off.
    """
    import diffusers.quantizers.bitsandbytes.bnb_quantizer as diffusers_bnb

    logging = pytest.importorskip("bitsandbytes.autograd._functions").logger
    monkeypatch.setattr(logging, "disabled", True)
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    for name in ("BnB4BitDiffusersQuantizer", "BnB8BitDiffusersQuantizer"):
        quantizer = getattr(diffusers_bnb, name)
        monkeypatch.setattr(quantizer, "validate_environment", lambda self, *a, **k: None)
        monkeypatch.setattr(quantizer, "update_device_map", lambda self, device_map: device_map or {"": "cpu"})
