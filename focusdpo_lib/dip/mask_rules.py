"""What makes a mask of a subject out of what models, files or colours say: pure functions on arrays."""

from collections.abc import Sequence

import numpy as np

from focusdpo_lib.dip.chain import Unfit


def intersections(boxes: np.ndarray) -> np.ndarray:
    """Areas (N, N) that boxes (N, 4) of corners x0, y0, x1, y1 share with each other; on the diagonal their own."""
    low = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    return np.clip(high - low, 0, None).prod(-1)


def choose(boxes: np.ndarray, scores: np.ndarray, threshold: float, same: float, rival: float) -> list[int]:
    """The box of each phrase, from boxes (N, 4) and what speaks for each phrase in them, scores (N, S) in [0, 1].

    1. In order of falling score, a phrase takes the box unless it has one already, the score is below `threshold`, or
       another phrase took the same thing: a box with an intersection over union of `same` or more.
    2. A phrase that has none then is *not found*.
    3. A phrase is found *more than once* where some other box, whose score is at least `rival` times that of its own
       (and `threshold`), shows another thing: it shares less than `same` of the smaller area with every box taken.

    Raises Unfit for 2 and 3.
    """
    areas = intersections(boxes)
    own = np.diagonal(areas)
    union = own[:, None] + own[None, :] - areas
    overlap = areas / np.maximum(union, 1e-9)
    covered = areas / np.maximum(np.minimum(own[:, None], own[None, :]), 1e-9)
    taken: dict[int, int] = {}
    for at in np.argsort(-scores, axis=None, kind="stable"):
        box, phrase = divmod(int(at), scores.shape[1])
        if scores[box, phrase] < threshold:
            break
        if phrase not in taken and all(overlap[box, other] < same for other in taken.values()):
            taken[phrase] = box
    if len(taken) < scores.shape[1]:
        raise Unfit("a subject was not found")
    shown = (covered[:, list(taken.values())] >= same).any(1)
    for phrase, box in taken.items():
        if ((scores[:, phrase] >= max(threshold, rival * scores[box, phrase])) & ~shown).any():
            raise Unfit("a subject was found more than once")
    return [taken[phrase] for phrase in range(scores.shape[1])]


def _rim(image: np.ndarray) -> np.ndarray:
    """The outermost pixels (H, W) of an image."""
    rim = np.zeros(image.shape[:2], bool)
    rim[[0, -1]] = rim[:, [0, -1]] = True
    return rim


def edge_colour(image: np.ndarray) -> np.ndarray:
    """The median (3,) of an image's outermost pixels, channel by channel."""
    return np.median(image[_rim(image)], axis=0)


def _alike(image: np.ndarray, tolerance: int) -> np.ndarray:
    """Where an image (H, W, 3) is, within `tolerance` levels in every channel, as the median of its edge."""
    return np.abs(image.astype(int) - edge_colour(image)).max(-1) <= tolerance


def edge_share(image: np.ndarray, tolerance: int) -> float:
    """The share of an image's outermost pixels that are alike: how plain its background is."""
    return float(_alike(image, tolerance)[_rim(image)].mean())


def from_background(image: np.ndarray, tolerance: int, plain: float) -> np.ndarray:
    """The mask (H, W) of what stands on a plain background, by colour, for an image (H, W, 3).

    The background's colour is the median of the outermost pixels, channel by channel. Background is what differs from
    it by at most `tolerance` levels in every channel and is connected to the edge through such pixels: white parts
    within the subject stay its own. Raises Unfit where less than the share `plain` of the edge is background.
    """
    from skimage.measure import label

    alike, rim = _alike(image, tolerance), _rim(image)
    if alike[rim].mean() < plain:
        raise Unfit("the background is not plain")
    parts = label(alike, connectivity=1)
    return ~(alike & np.isin(parts, np.unique(parts[rim & alike])))


def clean(mask: np.ndarray, holes: float, specks: float) -> np.ndarray:
    """The mask without holes and specks of less than these shares of its area; a hole at the edge is none."""
    from skimage.measure import label

    area = int(mask.sum())
    for value, share in ((True, specks), (False, holes)):
        parts = label(mask == value, connectivity=1)
        small = np.bincount(parts.ravel()) < share * area
        small[0] = False
        if value is False:
            edge = np.concatenate([parts[0], parts[-1], parts[:, 0], parts[:, -1]])
            small[np.unique(edge)] = False
        mask = mask ^ small[parts]
    return mask


def apart(masks: Sequence[np.ndarray], most: float) -> list[np.ndarray]:
    """The masks without common pixels: each of those goes to the smaller mask, which is what stands in front.

    Raises Unfit where two masks share more than `most` of the smaller one.
    """
    masks = list(masks)
    order = sorted(range(len(masks)), key=lambda i: int(masks[i].sum()))
    for place, small in enumerate(order):
        for large in order[place + 1 :]:
            common = masks[small] & masks[large]
            if common.sum() > most * masks[small].sum():
                raise Unfit("two masks cover the same thing")
            masks[large] = masks[large] & ~common
    return masks


def require_area(mask: np.ndarray, least: float, most: float) -> None:
    """Raises Unfit for a mask of less or more than these shares of the picture."""
    share = mask.mean()
    if share == 0:
        raise Unfit("a mask is empty")
    if share < least:
        raise Unfit("a mask is too small")
    if share > most:
        raise Unfit("a mask covers nearly the whole picture")
