"""The reader: recovers class, colours, pattern and trim of up to two subjects from an image of the toybox world.

It is to the toybox what a panel of human judges is to the real benchmark, so its own accuracy on held-out renders is
measured (`measure_reader`) and stated in the model card.
"""

from pathlib import Path

import numpy as np
import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock

from focusdpo_lib.evaluation.encoders import EncoderError
from focusdpo_lib.toybox import world
from focusdpo_lib.toybox.batches import (
    ABSENT,
    VALUES,
    autocast,
    generator,
    imperfect,
    sample_scenes,
    slot_labels,
    to_pixels,
)
from focusdpo_lib.toybox.fitting import fit

SLOTS = 2  # left, right
CELLS, CROP = 16, 40  # the locator's grid; pixels across the square that is cut out about a subject
REACH = 1.15  # half the side of that square, in radii


def _block(inputs: int, outputs: int, stride: int = 1) -> BasicBlock:
    """torchvision's residual block with group norm: no running statistics that generated images would break."""

    def norm(channels):
        return nn.GroupNorm(8, channels)

    if stride == 1 and inputs == outputs:
        return BasicBlock(inputs, outputs, norm_layer=norm)
    skip = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))
    return BasicBlock(inputs, outputs, stride, skip, norm_layer=norm)


class Locator(nn.Module):
    """Where the subjects are: images (B, 3, 64, 64) → log-attention (B, 2, 256), place (B, 2, 3), presence (B, 2)."""

    def __init__(self, width: int):
        super().__init__()
        self.fine = nn.Sequential(
            nn.Conv2d(3, width // 2, 5, 2, 2), nn.ReLU(), _block(width // 2, width, 2), _block(width, width)
        )
        self.coarse = nn.Sequential(_block(width, 2 * width, 2), _block(2 * width, 2 * width))
        self.join = nn.Conv2d(3 * width, 2 * width, 1)
        self.place = nn.Parameter(torch.zeros(1, 2 * width, CELLS, CELLS))
        self.attend = nn.Conv2d(2 * width, SLOTS, 3, padding=1)
        self.measure = nn.Linear(2 * width, 4)  # presence, and what to add to the centre and the radius
        axis = (torch.arange(CELLS) + 0.5) / CELLS
        self.register_buffer("cells", torch.cartesian_prod(axis, axis).flip(1), persistent=False)  # x, y

    def forward(self, images):
        fine = self.fine(images)
        coarse = F.interpolate(self.coarse(fine), size=fine.shape[-2:], mode="nearest")
        cells = F.relu(self.join(torch.cat([fine, coarse], 1)) + self.place)
        cells = cells + cells.mean((2, 3), keepdim=True)
        where = self.attend(cells).flatten(2).float().log_softmax(-1)
        measured = self.measure(where.exp().to(cells.dtype) @ cells.flatten(2).transpose(1, 2)).float()
        centre = (where.exp()[..., None] * self.cells).sum(-2) + 0.1 * measured[..., 1:3]  # no matmul: not in bf16
        return where, torch.cat([centre, 0.28 + 0.1 * measured[..., 3:]], -1), measured[..., 0]


def cut_out(images: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The squares about the places (B, S, 3), each scaled to CROP pixels: (B · S, 3, CROP, CROP)."""
    x, y, radius = places.flatten(0, 1).float().unbind(-1)
    zero, half = torch.zeros_like(x), 2 * REACH * radius  # in grid_sample's coordinates the image is 2 wide
    theta = torch.stack([half, zero, 2 * x - 1, zero, half, 2 * y - 1], -1).view(-1, 2, 3)
    grid = F.affine_grid(theta, [len(theta), 3, CROP, CROP], align_corners=False)
    return F.grid_sample(images.repeat_interleave(SLOTS, 0), grid, padding_mode="border", align_corners=False)


class Reader(nn.Module, PyTorchModelHubMixin):
    """Images (B, 3, 64, 64) in [-1, 1] → attribute → logits (B, 2 slots, values), slots ordered left to right.

    A locator finds centre and radius of the two subjects; each is cut out at one size, so that patterns lie where they
    always lie, and a second network classifies the cut-outs. Further keys: "place" (B, 2, 3: x, y, radius as fractions
    of the width) and "where", the locator's log-attention (B, 2, 256).
    """

    def __init__(self, width: int = 64):
        super().__init__()
        self.locator = Locator(width // 2)
        self.look = nn.Sequential(
            nn.Conv2d(3, width // 2, 5, 2, 2), nn.ReLU(), _block(width // 2, width, 2), _block(width, width),
            _block(width, 2 * width, 2), _block(2 * width, 2 * width),
            nn.Conv2d(2 * width, width, 1), nn.Flatten(), nn.Linear(width * (CROP // 8) ** 2, 4 * width), nn.ReLU(),
        )  # fmt: skip
        sizes = {name: len(values) - (name == "class_name") for name, values in VALUES.items()}
        self.heads = nn.ModuleDict({name: nn.Linear(4 * width, size) for name, size in sizes.items()})

    def forward(self, images: torch.Tensor, places: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """`places` (B, 2, 3), in training: cut out there instead of where the locator says, but for radius 0."""
        where, place, presence = self.locator(images)
        look_at = place.detach()
        if places is not None:
            look_at = torch.where(places[..., 2:] > 0, places, look_at)
        seen = self.look(cut_out(images, look_at)).unflatten(0, (-1, SLOTS))
        outputs = {name: head(seen).float() for name, head in self.heads.items()}
        there, absent = F.logsigmoid(presence)[..., None], F.logsigmoid(-presence)[..., None]
        outputs["class_name"] = torch.cat([outputs["class_name"].log_softmax(-1) + there, absent], -1)
        return outputs | {"place": place, "where": where}

    @torch.no_grad()
    def read(self, images: torch.Tensor, batch: int = 256) -> list[list[dict]]:
        """Images (B, 3, 64, 64) in [-1, 1] → for each, what was found from left to right: up to two dicts.

        A dict has the five ATTRIBUTES by name and `x`, the subject's centre as a fraction of the image's width.
        Raises EncoderError for images of another size.
        """
        if images.shape[1:] != (3, world.SCENE_SIZE, world.SCENE_SIZE):
            size = "×".join(str(side) for side in images.shape[-2:])
            raise EncoderError(
                f"the toybox's reader takes images of {world.SCENE_SIZE}×{world.SCENE_SIZE} pixels, not of {size}: "
                f"make them with generation.size {world.SCENE_SIZE}, or set evaluation.reader to null"
            )
        found = []
        for part in images.split(batch):
            outputs = {name: value.cpu() for name, value in self(part.to(self.locator.place)).items()}
            found.extend(decode(outputs))
        return found


def decode(outputs: dict[str, torch.Tensor]) -> list[list[dict]]:
    """A forward's outputs → one list an image of the subjects found; a slot whose class is "none" is left out."""
    best = {name: outputs[name].argmax(-1).tolist() for name in VALUES}
    centres = outputs["place"][..., 0].tolist()
    images = []
    for i, slots in enumerate(centres):
        read = [{name: VALUES[name][best[name][i][slot]] for name in VALUES} | {"x": x} for slot, x in enumerate(slots)]
        images.append([subject for subject in read if subject["class_name"] != "none"])
    return images


def reader_loss(outputs: dict[str, torch.Tensor], labels: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of every attribute, and the locator's errors; labels (B, 2, 5), places (B, 2, 3).

    The attention is drawn to a Gaussian of half the radius about the centre, the place by its L1 error in tenths.
    """
    loss = sum(
        F.cross_entropy(outputs[name].flatten(0, 1), labels[..., i].flatten())
        for i, name in enumerate(world.ATTRIBUTES)
    )
    present = places[..., 2] > 0
    places, axis = places[present], (torch.arange(CELLS, device=places.device) + 0.5) / CELLS
    cells = torch.cartesian_prod(axis, axis).flip(1)
    distance = (cells - places[:, None, :2]).square().sum(-1)
    target = (-2 * distance / places[:, 2:].square()).softmax(-1)
    located = -(target * outputs["where"][present]).sum(-1).mean()
    return loss + located + 10 * F.l1_loss(outputs["place"][present], places)


def magnify(pixels: torch.Tensor, places: torch.Tensor, draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Enlarges half of the single subjects, up to filling the image as in a studio photo; places (B, 2, 3) follow.

    The window kept has side s and holds the subject: new centre (centre − corner) / s, new radius radius / s.
    """
    single = (places[:, 0, 2] > 0) & (places[:, 1, 2] == 0)
    chance, size, shift = torch.rand(4, len(places), generator=draw).split([1, 1, 2])
    x, y, radius = places[:, 0].unbind(-1)
    side = (0.6 + 0.4 * size[0]).maximum(2.15 * radius)
    side = torch.where(single & (chance[0] < 0.5), side, 1.0)
    low = (torch.stack([x, y]) + radius - side).clamp_min(0)
    high = torch.minimum(torch.stack([x, y]) - radius, 1 - side)
    corner = torch.where(side < 1, low + shift * (high - low), 0.0).T.clamp_min(0).minimum(1 - side[:, None])
    zero, middle = torch.zeros_like(side), 2 * corner + side[:, None] - 1
    theta = torch.stack([side, zero, middle[:, 0], zero, side, middle[:, 1]], -1).view(-1, 2, 3)
    pixels = F.grid_sample(pixels, F.affine_grid(theta, list(pixels.shape), align_corners=False), align_corners=False)
    places = places.clone()
    places[:, 0] = torch.cat([places[:, 0, :2] - corner, places[:, 0, 2:]], -1) / side[:, None]
    return pixels, places


def save_reader(model: Reader, folder: Path) -> None:
    """config.json and model.safetensors, as `Reader.from_pretrained(folder)` reads them."""
    model.save_pretrained(folder)
    (Path(folder) / "README.md").unlink()  # the hub's empty card


def train_reader(
    folder: Path, steps: int = 2000, batch: int = 64, seed: int = 0, device: str = "cpu", *, pool: int = 30000,
    width: int = 64, **options,
) -> tuple[Reader, list[dict]]:  # fmt: skip
    """Trains on `pool` scenes, made imperfect; resumable in `folder`. `options` go to `fit`."""
    torch.manual_seed(seed)
    model = Reader(width).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.02)
    scenes = sample_scenes(pool, seed)

    def loss_at(step):
        draw = generator(seed, step)
        at = torch.randint(pool, (batch,), generator=draw).numpy()
        pixels, places = magnify(to_pixels(scenes.images[at]), torch.from_numpy(scenes.places[at]), draw)
        pixels, places = imperfect(pixels, draw).to(device), places.to(device)
        labels = torch.from_numpy(scenes.labels[at]).to(device)
        shaken = places + 0.06 * places[..., 2:] * torch.randn(places.shape, generator=draw).to(device)
        with autocast(device):
            outputs = model(pixels, shaken)
        right = share_right(outputs, labels).tolist()
        return reader_loss(outputs, labels, places), dict(zip(world.ATTRIBUTES, right, strict=True))

    curve = fit("reader", nn.ModuleDict({"model": model}), [optimizer], loss_at, steps, folder, **options)
    return model.eval(), curve


def share_right(outputs: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """Share of right answers of each attribute (5,), over the slots that have the attribute."""
    right = torch.stack([outputs[name].detach().argmax(-1) for name in world.ATTRIBUTES], -1) == labels
    known = labels != ABSENT
    return (right & known).sum((0, 1)) / known.sum((0, 1))


@torch.no_grad()
def measure_reader(model: Reader, count: int = 2000, seed: int = 1, split: str = "test") -> dict[str, float]:
    """Accuracy on held-out renders, as rendered and after `imperfect`, of one and of two subjects.

    Each attribute over the slots that hold a subject, "count" the share of images where as many subjects are found as
    there are, and "x_error" the mean distance of the centre found from the true one along x, in pixels. The same
    accuracies of studio photos stand under "photo".
    """
    scenes = sample_scenes(count, seed, split)
    pixels = to_pixels(scenes.images)
    numbers = {}
    for prefix, images in (("", pixels), ("imperfect_", imperfect(pixels, generator(seed)))):
        found = model.read(images)
        for word, start in (("one", 0), ("two", 1)):
            facts = _compare(found[start::2], scenes.labels[start::2], scenes.places[start::2])
            numbers |= {f"{prefix}{word}_{name}": round(value, 4) for name, value in facts.items()}
    rng = np.random.default_rng(seed)
    identities = [world.sample_identity(rng, split) for _ in range(max(2, count // 4))]
    photos = np.stack([world.photo(identity, k) for k, identity in enumerate(identities)])
    labels = np.array([[slot_labels(identity)] for identity in identities])
    facts = _compare(model.read(to_pixels(photos)), labels, None)
    return numbers | {f"photo_{name}": round(value, 4) for name, value in facts.items() if name != "x_error"}


def _compare(found: list[list[dict]], labels: np.ndarray, places: np.ndarray | None) -> dict[str, float]:
    """Accuracies of one count of subjects, slot by slot; a subject that was not found is wrong in every attribute."""
    subjects = int((labels[0, :, 1] != ABSENT).sum())
    right = np.zeros((len(found), subjects, len(VALUES)))
    counted, distances = [], []
    for i, read in enumerate(found):
        counted.append(len(read) == subjects)
        for slot, subject in enumerate(read[:subjects]):
            right[i, slot] = [VALUES[name].index(subject[name]) == labels[i, slot, k] for k, name in enumerate(VALUES)]
            if places is not None:
                distances.append(world.SCENE_SIZE * abs(subject["x"] - places[i, slot, 0]))
    means = dict(zip(VALUES, right.mean((0, 1)).tolist(), strict=True))
    return means | {"count": float(np.mean(counted)), "x_error": float(np.mean(distances)) if distances else np.nan}
