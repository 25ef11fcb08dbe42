"""The model and the batch of a case: the shipped toybox on real pairs, or random weights on random pairs.

A step costs the same whatever the numbers are, so nothing is downloaded. Encoders are the toybox's: no step uses them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel, UNet2DConditionModel
from peft import LoraConfig

from focusdpo_lib import backbones, params
from focusdpo_lib.backbones import Backbone, Conditioning, FluxUno, SdxlIp, View
from focusdpo_lib.backbones.flux_uno import LORA_TARGETS
from focusdpo_lib.bench.cases import Case
from focusdpo_lib.dip.toybox import make_pair
from focusdpo_lib.runs import atomic
from focusdpo_lib.toybox.ip_adapter import new_ip_adapter
from focusdpo_lib.toybox.pipelines import build_flux, build_sdxl
from focusdpo_lib.training.pairs import PreparedPairs, prepare

IP_ADAPTER = "ip_adapter"  # its folder in that of the model
# IP-Adapter-Plus: the widths of its resampler and of the image encoder's hidden layers, of which no step uses one.
SHIPPED = {"toybox": "flux_uno", "toybox_ipap": "sdxl_ip"}
PLUS = {"hidden": 1280, "width": 1280, "layers": 1}
RESAMPLER = {"full": PLUS, "sampled": PLUS, "small": {}}


@contextmanager
def made_on(device: torch.device) -> Iterator[None]:
    """New modules are born in bfloat16 on the device: FLUX through a CPU's float32 would be 48 GB and minutes."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def build_pipeline(case: Case, device: torch.device) -> DiffusionPipeline:
    """A pipeline whose transformer or U-Net has the sizes of the case and random bfloat16 weights."""
    if case.model == "flux":
        pipeline, part, network = build_flux(), "transformer", FluxTransformer2DModel
    else:
        pipeline, part, network = build_sdxl(), "unet", UNet2DConditionModel
    with made_on(device):
        pipeline.register_modules(**{part: network(**case.sizes.network)})
    return pipeline


def write_ip_adapter(case: Case, pipeline: DiffusionPipeline, folder: Path) -> None:
    with made_on(torch.device("cpu")):  # small, and the U-Net may be one without contents (see `count`)
        new_ip_adapter(folder, pipeline.unet, **RESAMPLER[case.size])


def built(case: Case, device: torch.device, scratch: Path) -> Backbone:
    """The random model of a case, unquantized, in the device's memory."""
    pipeline = build_pipeline(case, device)
    if case.model == "flux":
        return with_subject_lora(FluxUno(pipeline.to(device), precision="bfloat16"), case)
    settings, folder = params.Backbone(), scratch / f"{IP_ADAPTER}-{case.size}"
    if not folder.exists():
        with atomic(folder) as partial:
            write_ip_adapter(case, pipeline, partial)
    path = Path(settings.ip_weights)
    pipeline.load_ip_adapter(
        str(folder), subfolder=str(path.parent), weight_name=path.name, image_encoder_folder=settings.ip_encoder
    )
    return SdxlIp(pipeline.to(device), precision="bfloat16")


def with_subject_lora(backbone: FluxUno, case: Case) -> FluxUno:
    """The layers that UNO's file puts on FLUX, in the dtype it takes there: frozen, random, a tenth of the base."""
    config = LoraConfig(r=case.sizes.subject_rank, target_modules=LORA_TARGETS, init_lora_weights=False)
    with made_on(backbone.network.device):  # of FLUX's full size 5 GB and seconds on a CPU else
        backbone.network.add_adapter(config, "subject")
    for name, parameter in backbone.network.named_parameters():
        if ".subject." in name:
            parameter.data = parameter.data.to(torch.bfloat16)  # float32 on a quantized base else
            parameter.requires_grad_(False)
    return backbone


def saved(case: Case, device: torch.device, scratch: Path) -> Path:
    """The folder of the random model, written once: quantization is a matter of loading."""
    folder = scratch / f"{case.model}-{case.size}"
    if not folder.exists():
        with atomic(folder) as partial:
            pipeline = build_pipeline(case, device)
            pipeline.save_pretrained(partial)
            if case.model == "sdxl":
                write_ip_adapter(case, pipeline, partial / IP_ADAPTER)
    return folder


def load_saved(case: Case, device: torch.device, scratch: Path) -> Backbone:
    """The random model through the loader that every run uses, its weights held as the case says."""
    folder = saved(case, device, scratch)
    settings = {"model": str(folder), "weights": case.weights, "precision": "bfloat16"}
    settings |= {"family": "flux_uno"} if case.model == "flux" else {"family": "sdxl_ip"}
    settings |= {} if case.model == "flux" else {"ip_adapter": str(folder / IP_ADAPTER)}
    backbone = backbones.load(params.section("backbone", settings, "the benchmark"), device)
    return with_subject_lora(backbone, case) if case.model == "flux" else backbone


def load(case: Case, device: torch.device, scratch: Path) -> Backbone:
    """The frozen backbone of a case; `scratch` keeps what later cases of this run share."""
    if case.size == "shipped":
        return backbones.load(params.Backbone(family=SHIPPED[case.model]), device)
    return (built if case.weights == "bfloat16" else load_saved)(case, device, scratch)


def load_pairs(case: Case, backbone: Backbone, count: int) -> PreparedPairs:
    """`count` pairs for a step of the case: the toybox's own, or random ones of the case's shapes."""
    if case.size != "shipped":
        return random_pairs(case, backbone, count)
    dip = params.Dip(two_subject_share=float(case.references - 1))
    pairs = [make_pair(dip, "train", i) for i in range(count)]
    return prepare(backbone, pairs, params.Masks())[case.references]


def random_pairs(case: Case, backbone: Backbone, count: int) -> PreparedPairs:
    """Random latents and conditioning; each subject owns a band of token columns, as wide as the gap beside it.

    A reference shows its subject in the left half.
    """
    sizes, subjects = case.sizes, case.references
    height, width = grid = backbone.token_grid(sizes.latents)
    band = torch.arange(width) * 2 * subjects // width  # even bands are the subjects'
    prior = torch.stack([(band == 2 * s).float().expand(height, width).flatten() for s in range(subjects)])
    shape = sizes.view or sizes.reference[subjects]
    left = (torch.arange(shape[-1]) < shape[-1] // 2).float().expand(count, *shape[-2:])
    view = View(torch.randn(count, *shape), torch.randn(count, *sizes.text), torch.randn(count, sizes.pooled))
    return PreparedPairs(
        ids=tuple(f"random-{i}" for i in range(count)),
        win=torch.randn(count, *sizes.latents),
        lose=torch.randn(count, *sizes.latents),
        conditioning=Conditioning(
            torch.randn(count, *sizes.text),
            torch.randn(count, sizes.pooled),
            tuple(torch.randn(count, *sizes.reference[subjects]) for _ in range(subjects)),
            views=(view,) * subjects if sizes.view else (),
        ),
        prior_tokens=prior.repeat(count, 1, 1),
        detail=torch.rand(count, *sizes.latents[-2:]),
        token_grid=grid,
        cover=(left,) * subjects,
    )
