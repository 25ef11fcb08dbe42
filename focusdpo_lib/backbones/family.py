"""What the families share: precision, sampling, and our adapter, which training moves and the reference model lacks."""

import json
import warnings
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from diffusers import BitsAndBytesConfig
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from focusdpo_lib.backbones.conditioning import Conditioning

ADAPTER = "policy"  # the name of the one adapter that training moves
TEXT_PARTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
QUANTIZED = {"int8": {"load_in_8bit": True}, "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}


def computes_in_bfloat16(device: torch.device) -> bool:
    """Whether the device has bfloat16 arithmetic of its own (elsewhere bfloat16 works, but slower than float32)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # torch before 2.12 cannot tell: float32 is safe
    return device.type == "cpu" and bool(capabilities.get("avx512_bf16"))


def chosen_precision(precision: str, device: torch.device, weights: str = "float32") -> torch.dtype:
    """The dtype that a setting names; "auto" is what the weights are held in, or bfloat16 where the device has it."""
    if precision != "auto":
        return getattr(torch, precision)
    if weights in ("bfloat16", "float16"):
        return getattr(torch, weights)
    if computes_in_bfloat16(device):
        return torch.bfloat16
    return torch.float32 if weights == "float32" else torch.float16  # a quantized base on a GPU before bfloat16


def held(name: str, network: str, weights: str, precision: torch.dtype) -> dict:
    """Keyword arguments of `from_pretrained` that hold the pipeline's part of this name in `weights`.

    Quantized, the `network` goes through diffusers' bitsandbytes backend, computes in `precision`, and the encoders are
    held in it. The autoencoder is small and stays in float32: SDXL's own overflows half precision.
    """
    if name == "vae":
        return {"dtype": torch.float32}
    if weights not in QUANTIZED:
        return {"dtype": getattr(torch, weights)}
    if name != network:
        return {"dtype": precision}
    compute = {"bnb_4bit_compute_dtype": precision} if weights == "nf4" else {}
    return {"dtype": precision, "quantization_config": BitsAndBytesConfig(**QUANTIZED[weights], **compute)}


def require_channels(network: nn.Module) -> None:
    """Raises ValueError for a network of another task: those for filling in or for edges take more than they give."""
    takes, gives = network.config.in_channels, network.config.out_channels or network.config.in_channels
    if takes != gives:
        raise ValueError(f"its network takes {takes} channels and gives {gives}: it is made for another task")


def compute_in(network: nn.Module, precision: torch.dtype) -> None:
    """Gives every quantized layer its input in `precision`.

    A GPU's autocast runs norms in float32, and bitsandbytes, which autocast does not reach, computes in what it gets.
    """

    def cast(module, inputs):
        return (inputs[0].to(precision), *inputs[1:])

    for module in network.modules():
        if type(module).__module__.startswith("bitsandbytes"):
            module.register_forward_pre_hook(cast)


@contextmanager
def _beside_others():
    """Where our adapter joins the subject LoRA, peft warns that there is one already: rightly, and it is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        yield


def _in_one_order(path: Path) -> None:
    """Sorts the facts in a safetensors file's header, which the library writes in any order: so that the same weights
    are the same file, and an adapter that was trained again is the same input."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


class Family:
    """What every backbone does alike; a family sets the attributes below and says how to encode, predict, denoise."""

    network: nn.Module  # the transformer or U-Net that carries the LoRA
    part: str  # its name in the pipeline, "transformer" or "unet", which prefixes the keys of a saved adapter
    targets: str  # R17: a regular expression of the modules that get LoRA weights
    predicts: str  # "velocity" or "epsilon"
    multiple: int  # the sides of an image are multiples of so many pixels
    reference_multiple: int  # and those of a reference that masks are derived from

    def autocast(self):
        """Mixed precision as `precision` says; float32 weights stay float32."""
        mixed = self.precision != torch.float32
        return torch.autocast(self.device.type, self.precision if mixed else torch.bfloat16, enabled=mixed)

    def attention(self):
        """On a CPU the fused attention kernel's backward is slow at short lengths: 40 % of a toybox step."""
        recomputed = self.network.is_gradient_checkpointing  # in the backward pass, where this context is over
        return sdpa_kernel(SDPBackend.MATH) if self.device.type == "cpu" and not recomputed else nullcontext()

    @torch.no_grad()
    def condition(
        self,
        prompts: list[str],
        references: Sequence[torch.Tensor],
        regions: torch.Tensor | None = None,
        classes: Sequence[Sequence[str]] = (),
    ) -> Conditioning:
        """Everything a prediction is conditioned on, for B prompts and S batches of reference pixels (B, 3, h, w).

        `regions` (B, S, h, w), where each subject stands, matters only to a family that can bind references to places;
        `classes`, S times B words, only to one that looks at references in a pass of their own (R7).
        """
        return Conditioning(*self.encode_prompts(prompts), self.encode_references(references))

    @torch.no_grad()
    def sample(self, conditioning: Conditioning, seeds: Sequence[int], size: tuple[int, int], steps: int, guidance=1.0):
        """Images (B, 3, H, W) in [-1, 1] by the pipeline's own scheduler; `size` is (H, W) in pixels.

        The noise of a sample comes from a CPU generator of its own seed, so it does not depend on the batch or device.
        """
        if any(side % self.multiple for side in size):
            raise ValueError(f"images of {size[0]}×{size[1]} pixels: both must be multiples of {self.multiple}")
        shape = (self.vae.config.latent_channels, size[0] // self.stride, size[1] // self.stride)
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        latents = torch.stack(noise).to(self.device)
        return self.decode(self.denoise(latents, conditioning, steps, guidance))

    # --- our adapter -------------------------------------------------------------------------------------------------

    def add_adapter(self, rank: int, alpha: float | None = None, targets: list[str] | None = None, seed: int = 0):
        """Puts a fresh LoRA on the network, the only (float32) weights with gradients; B = 0: no change yet."""
        config = LoraConfig(r=rank, lora_alpha=alpha or rank, target_modules=targets or self.targets)
        others = self._without_adapter()
        with torch.random.fork_rng(devices=[]), _beside_others():
            torch.manual_seed(seed)
            self.network.add_adapter(config, ADAPTER)
        self.network.set_adapter([*others, ADAPTER])
        for name, parameter in self.network.named_parameters():
            ours = f".{ADAPTER}." in name
            parameter.requires_grad_(ours)
            if ours:
                parameter.data = parameter.data.float()

    def _without_adapter(self) -> list[str]:
        """Takes our adapter off, if there is one; returns the names of the base's own."""
        names = list(getattr(self.network, "peft_config", {}))
        if ADAPTER in names:
            self.network.delete_adapters(ADAPTER)
        return [name for name in names if name != ADAPTER]

    def adapter_parameters(self) -> list[nn.Parameter]:
        return [p for p in self.network.parameters() if p.requires_grad]

    @contextmanager
    def reference_model(self):
        """Within this context our adapter, and it alone, is off: the model is the base, its subject LoRA included."""
        layers = [m for m in self.network.modules() if isinstance(m, BaseTunerLayer)]
        before = [(layer, list(layer.active_adapters)) for layer in layers]
        trainable = self.adapter_parameters()
        for layer, active in before:  # peft's own switch also toggles requires_grad: it is put back below
            layer.set_adapter([name for name in active if name != ADAPTER])
        try:
            yield
        finally:
            for layer, active in before:
                layer.set_adapter(active)
            self.network.requires_grad_(False)
            for parameter in trainable:
                parameter.requires_grad_(True)

    def save_adapter(self, folder: Path) -> None:
        """Writes our adapter as `pytorch_lora_weights.safetensors`, which the plain pipeline's loader reads."""
        state = get_peft_model_state_dict(self.network, adapter_name=ADAPTER)
        config = self.network.peft_config[ADAPTER].to_dict()  # without it a loader takes alpha for the rank
        facts = {name: config[name] for name in ("r", "lora_alpha", "target_modules")}
        facts = {name: sorted(value) if isinstance(value, set) else value for name, value in facts.items()}
        layers = {f"{self.part}_lora_layers": state, f"{self.part}_lora_adapter_metadata": facts}
        self.pipeline.save_lora_weights(folder, **layers, safe_serialization=True)
        _in_one_order(Path(folder) / LORA_WEIGHT_NAME_SAFE)

    def load_adapter(self, folder: Path) -> None:
        """Loads an adapter that `save_adapter` wrote, on top of whatever is part of the base; replaces one of ours.

        Raises FileNotFoundError where there is none, and ValueError for one that is damaged.
        """
        if not (Path(folder) / LORA_WEIGHT_NAME_SAFE).is_file():
            raise FileNotFoundError(f"{folder} holds no adapter ({LORA_WEIGHT_NAME_SAFE}): train it again")
        others = self._without_adapter()
        how = {"adapter_name": ADAPTER, "weight_name": LORA_WEIGHT_NAME_SAFE, "use_safetensors": True}
        try:
            with _beside_others():
                self.network.load_lora_adapter(folder, prefix=self.part, **how)
        except (SafetensorError, OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"the adapter {folder} cannot be loaded ({reason}): delete {Path(folder).parent} and train it again"
            ) from None
        self.network.set_adapter([*others, ADAPTER])
        self.network.requires_grad_(False)
