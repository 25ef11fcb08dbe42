"""The toybox world: identities, scenes and photos, with every mask and attribute known exactly.

An *identity* is one instance of a class: its palette (base and accent colour), pattern, pattern angle and trim
colour. A *scene* shows one or two identities in a setting; its caption names classes and setting only, so that an
identity can come from the reference image alone. A *photo* shows one identity before a plain backdrop.
"""

import zlib
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from focusdpo_lib.toybox.settings import SETTINGS, blend
from focusdpo_lib.toybox.shapes import SHAPES, circle, union

SCENE_SIZE = 64
PHOTO_SIZE = 64
REFERENCE_SIZE = 32

CLASSES = tuple(SHAPES)
PATTERNS = ("dots", "plaid", "spot", "stripes")
ANGLES = (0, 45, 90, 135)
TURN = {"dots": 90, "plaid": 90, "spot": 360, "stripes": 180}  # degrees after which a pattern looks the same
SPLITS = ("train", "validation", "test")
COLOURS = {
    "red": (0.86, 0.13, 0.15),
    "orange": (0.98, 0.55, 0.08),
    "yellow": (0.98, 0.88, 0.2),
    "lime": (0.6, 0.87, 0.2),
    "green": (0.07, 0.5, 0.22),
    "cyan": (0.2, 0.82, 0.87),
    "blue": (0.13, 0.3, 0.87),
    "purple": (0.5, 0.18, 0.66),
    "pink": (0.99, 0.56, 0.74),
    "brown": (0.45, 0.26, 0.12),
    "white": (0.98, 0.98, 0.98),
    "black": (0.1, 0.1, 0.12),
}
ATTRIBUTES = ("class_name", "base", "accent", "pattern", "trim")  # what the reader recovers from an image
_RGB = {name: np.asarray(rgb, np.float32) for name, rgb in COLOURS.items()}


@dataclass(frozen=True, order=True)
class Identity:
    """One instance of a class; `angle` is the pattern's direction in degrees.

    Of angles at which the pattern looks the same the smallest is kept, so that identities that render alike are equal.
    """

    class_name: str
    base: str
    accent: str
    pattern: str
    angle: int
    trim: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "angle", self.angle % TURN[self.pattern])

    @property
    def split(self) -> str:
        """'train', 'validation' or 'test', fixed by checksums of the attributes: no identity is in two splits.

        Each angle at which it looks the same has a checksum; the identity is in the earliest of their splits, so that
        it is held out only if every one of them is.
        """
        before = "/".join([self.class_name, self.base, self.accent, self.pattern])
        alike = range(self.angle, ANGLES[-1] + 1, TURN[self.pattern])
        keys = [f"{before}/{angle}/{self.trim}" for angle in alike]
        buckets = {zlib.crc32(key.encode()) % 20 for key in keys}
        return SPLITS[min({0: 2, 1: 1}.get(bucket, 0) for bucket in buckets)]


@dataclass(frozen=True)
class Placement:
    """Where a subject stands: centre and radius as fractions of the image's width, rotation in degrees."""

    x: float
    y: float
    radius: float
    rotation: float = 0.0


@dataclass(frozen=True)
class Scene:
    """Everything that is needed to draw one image; `seed` varies the setting and `light` the subjects' brightness."""

    setting: str
    identities: tuple[Identity, ...]
    placements: tuple[Placement, ...]
    seed: int = 0
    light: float = 1.0

    @property
    def caption(self) -> str:
        subjects = " and ".join(f"a {identity.class_name}" for identity in self.identities)
        return f"{subjects} {SETTINGS[self.setting][1]}"


def sample_identity(rng: np.random.Generator, split: str = "train", class_name: str | None = None) -> Identity:
    """A random identity of a split; its three colours differ. Patterns are as frequent in one split as in another."""
    class_name, pattern = class_name or str(rng.choice(CLASSES)), str(rng.choice(PATTERNS))
    colours = list(COLOURS)
    while True:
        base, accent, trim = (colours[i] for i in rng.permutation(len(colours))[:3])
        angle = ANGLES[rng.integers(len(ANGLES))]  # as rng.choice draws, which takes four times as long
        identity = Identity(class_name, base, accent, pattern, angle, trim)
        if identity.split == split:
            return identity


def sample_placements(rng: np.random.Generator, count: int) -> tuple[Placement, ...]:
    """Places for one subject, or for two side by side that hardly touch, in random left-right order."""
    if count == 1:
        r = rng.uniform(0.27, 0.35)
        return (Placement(rng.uniform(r, 1 - r), rng.uniform(r + 0.04, 0.98 - r), r, rng.uniform(-10, 10)),)
    if count != 2:
        raise ValueError(f"a toybox scene shows one or two subjects, not {count}")
    r = rng.uniform(0.215, 0.24, 2)
    slack = rng.uniform(0, 1 - 2 * r.sum() - 0.03)
    x = (r[0] + slack * rng.uniform(), 1 - r[1] - slack * rng.uniform())
    y = rng.uniform(r + 0.1, 0.97 - r)
    places = [Placement(float(x[i]), float(y[i]), float(r[i]), rng.uniform(-10, 10)) for i in range(2)]
    return tuple(places if rng.uniform() < 0.5 else places[::-1])


def sample_scene(rng: np.random.Generator, identities: tuple[Identity, ...], setting: str | None = None) -> Scene:
    """A random scene of the given identities, in a given or a random setting."""
    setting = setting or str(rng.choice(list(SETTINGS)))
    placements = sample_placements(rng, len(identities))
    return Scene(setting, tuple(identities), placements, int(rng.integers(2**31)), rng.uniform(0.94, 1.06))


def sample_subjects(rng: np.random.Generator, count: int, split: str = "train") -> tuple[Identity, ...]:
    """Identities of `count` different classes."""
    names = rng.choice(CLASSES, count, replace=False)
    return tuple(sample_identity(rng, split, str(name)) for name in names)


@cache
def _pixel_grid(size: int):
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    return np.meshgrid(axis, axis)


def _pattern(identity: Identity, x, y):
    """Signed distance to the area painted in the accent colour."""
    turn = np.deg2rad(identity.angle)
    u, v = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    period = 0.68

    def off_centre(w):
        return (w + period / 2) % period - period / 2

    if identity.pattern == "stripes":
        return np.abs(off_centre(u)) - 0.21 * period
    if identity.pattern == "plaid":
        return np.minimum(np.abs(off_centre(u)), np.abs(off_centre(v))) - 0.14 * period
    if identity.pattern == "dots":
        return np.hypot(off_centre(u), off_centre(v)) - 0.3 * period
    return circle(u, v, 0.14, 0.1, 0.42)


def _paint(identity: Identity, placement: Placement, light: float, canvas, size: int):
    """Draws one subject onto the canvas (H, W, 3) in place; returns its coverage (H, W) in [0, 1]."""
    px = placement.radius * size  # pixels a unit of the subject's own coordinates
    reach = px * 1.45
    cx, cy = placement.x * size, placement.y * size
    x0, x1 = max(int(cx - reach), 0), min(int(cx + reach) + 2, size)
    y0, y1 = max(int(cy - reach), 0), min(int(cy + reach) + 2, size)
    gx, gy = _pixel_grid(size)
    dx, dy = (gx[y0:y1, x0:x1] * size - cx) / px, (gy[y0:y1, x0:x1] * size - cy) / px
    turn = np.deg2rad(placement.rotation)
    x, y = dx * np.cos(turn) + dy * np.sin(turn), dy * np.cos(turn) - dx * np.sin(turn)

    def cover(distance):
        return np.clip(0.5 - distance * px, 0, 1)[..., None].astype(np.float32)

    body, part, eyes = SHAPES[identity.class_name]
    outline = body(x, y)
    colour = blend(_RGB[identity.base], _RGB[identity.accent], cover(_pattern(identity, x, y)))
    colour = blend(colour, _RGB[identity.trim], cover(-outline - 0.15))  # a border of 0.15 inside the outline
    if part is not None:
        distance = part(x, y)
        colour = blend(colour, _RGB[identity.trim], cover(distance))
        outline = union(outline, distance)
    for ex, ey, er in eyes:
        colour = blend(colour, (0.97, 0.97, 0.97), cover(circle(x, y, ex, ey, er + 0.05)))
        colour = blend(colour, (0.05, 0.05, 0.07), cover(circle(x, y, ex, ey, er)))
    alpha = cover(outline)
    view = canvas[y0:y1, x0:x1]
    view += (colour * light * (1.03 - 0.08 * y[..., None]) - view) * alpha
    coverage = np.zeros((size, size), np.float32)
    coverage[y0:y1, x0:x1] = alpha[..., 0]
    return coverage


def render(scene: Scene, size: int = SCENE_SIZE) -> tuple[np.ndarray, np.ndarray]:
    """Draws a scene: image (H, W, 3) uint8 and masks (S, H, W) bool, true where a subject covers any of the pixel."""
    gx, gy = _pixel_grid(size)
    canvas = SETTINGS[scene.setting][0](gx, gy, np.random.default_rng(scene.seed), size).astype(np.float32)
    coverage = [
        _paint(identity, placement, scene.light, canvas, size)
        for identity, placement in zip(scene.identities, scene.placements, strict=True)
    ]
    return _to_uint8(canvas), np.stack(coverage) > 0


def photo(identity: Identity, seed: int, size: int = PHOTO_SIZE) -> np.ndarray:
    """A studio photo of one identity, (H, W, 3) uint8: plain pale backdrop, the subject large; pose and light vary."""
    return photo_and_mask(identity, seed, size)[0]


def photo_and_mask(identity: Identity, seed: int, size: int = PHOTO_SIZE) -> tuple[np.ndarray, np.ndarray]:
    """`photo`, and where it shows the identity: (H, W) bool, true where the subject covers any of the pixel."""
    rng = np.random.default_rng(seed)
    _, gy = _pixel_grid(size)
    tint = 0.9 + 0.06 * rng.uniform(-1, 1, 3)
    canvas = (tint * (1 - 0.12 * gy[..., None] * rng.uniform(0, 1))).astype(np.float32)
    r = rng.uniform(0.41, 0.45)
    x, y = 0.5 + rng.uniform(-1, 1, 2) * (0.49 - r)
    coverage = _paint(identity, Placement(x, y, r, rng.uniform(-8, 8)), rng.uniform(0.95, 1.05), canvas, size)
    return _to_uint8(canvas), coverage > 0


def halve(image: np.ndarray) -> np.ndarray:
    """A 2×2 box average, (H, W, 3) uint8 → (H/2, W/2, 3) uint8: a photo as the model's reference input."""
    h, w, c = image.shape
    return np.rint(image.reshape(h // 2, 2, w // 2, 2, c).astype(np.float32).mean((1, 3))).astype(np.uint8)


def halve_mask(mask: np.ndarray) -> np.ndarray:
    """The mask of a halved photo, (H, W) bool → (H/2, W/2) bool: where the subject covers any of the pixel."""
    h, w = mask.shape
    return mask.reshape(h // 2, 2, w // 2, 2).any((1, 3))


def with_identities(scene: Scene, identities: tuple[Identity, ...]) -> Scene:
    """The same scene, pixel for pixel outside the subjects, with other identities of the same classes in place."""
    if [i.class_name for i in identities] != [i.class_name for i in scene.identities]:
        raise ValueError("with_identities keeps the silhouettes: give identities of the scene's own classes, in order")
    return replace(scene, identities=tuple(identities))


def _to_uint8(canvas: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(canvas, 0, 1) * 255).astype(np.uint8)
