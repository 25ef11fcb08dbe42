"""Every picture that the kit reads, as a viewer shows it: photos, references, masks, generated images.

Upright by its EXIF tag, transparent parts on white (as references lie on white), 8 bits a channel, RGB. Colour profiles
are not applied, as in the published evaluations.
"""

import io
import struct
import warnings
import zlib
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# Formats that the decoder may choose from, whatever the suffix says. None of them runs a program or reads other files.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")

# In which ways decoders fail on damaged files. Too little memory and an interrupt are none of them.
DAMAGED = (OSError, SyntaxError, ValueError, TypeError, EOFError, LookupError, ArithmeticError, AssertionError)
DAMAGED += (AttributeError, RuntimeError, struct.error, zlib.error)

Source = str | Path | bytes | Image.Image


class PictureError(ValueError):
    """A picture that cannot be used; the message says which, why and what to do."""


@cache
def suffixes() -> tuple[str, ...]:
    """File name endings, in lower case, of the formats that are read."""
    Image.init()
    return tuple(sorted(s for s, name in Image.registered_extensions().items() if name in (*FORMATS, "MPO")))


def photos(folder: Path) -> tuple[list[Path], list[str]]:
    """(the pictures in a folder, the names of whatever else lies there), in order of name and without hidden files."""
    files = sorted(p for p in folder.glob("*") if not p.name.startswith("."))
    counted = [p for p in files if p.is_file() and p.suffix.lower() in suffixes()]
    return counted, [p.name for p in files if p not in counted]


def read(source: Source, name: str | None = None) -> Image.Image:
    """An RGB picture, fully decoded. `name` is what errors call it (default: its path).

    Raises PictureError for a file that is missing, damaged, animated or too large, or of 32 bits a channel.
    """
    picture = _decoded(source, name or _called(source))
    if picture.mode == "RGB":
        return picture
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def read_mask(source: Source, name: str | None = None) -> np.ndarray:
    """A mask (H, W) of bool from a picture that is black and white alone.

    Raises PictureError where `read` does, and for transparency or any other value: which part is meant, nobody knows.
    """
    name = name or _called(source)
    levels = np.asarray(_decoded(source, name))
    if (levels[..., 3:] < 255).any():
        raise PictureError(f"{name} has transparent parts, which a mask cannot have: save it in black and white")
    if not (np.isin(levels, (0, 255)).all() and (levels[..., :3] == levels[..., :1]).all()):
        raise PictureError(f"{name} holds values other than 0 and 255: save it in black and white")
    return levels[..., 0] > 0


def _called(source: Source) -> str:
    return f"the image {source}" if isinstance(source, str | Path) else "the image"


def _decoded(source: Source, name: str) -> Image.Image:
    """RGB, or RGBA where there may be transparency."""
    data = _contents(source, name) if isinstance(source, str | Path) else source
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # remarks on metadata, which nobody reads here
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if isinstance(data, Image.Image):
                return _as_seen(data, name)
            with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
                return _as_seen(picture, name)
    except PictureError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        limit = f"{Image.MAX_IMAGE_PIXELS / 1e6:.0f} megapixels"
        raise PictureError(f"{name} has more than {limit}: scale it down") from None
    except UnidentifiedImageError:
        formats = ", ".join(FORMATS)
        raise PictureError(f"{name} cannot be read: it is damaged or no {formats}; delete it or save it anew") from None
    except DAMAGED as error:
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        raise PictureError(f"{name} cannot be read ({reason}): delete it and make or fetch it again") from error


def _contents(path: str | Path, name: str) -> bytes:
    """A file's bytes. They are read here, so that no error of the disk passes for one of the picture."""
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise PictureError(f"{name} is missing: restore it, or make it again") from None
    except (OSError, ValueError) as error:  # the latter: a name that no file can have
        reason = getattr(error, "strerror", None) or error
        raise PictureError(
            f"{name} cannot be opened ({type(error).__name__}: {reason}): make it a file that can be read"
        ) from error


def _as_seen(picture: Image.Image, name: str) -> Image.Image:
    frames = getattr(picture, "n_frames", 1)
    if frames > 1 and picture.format != "MPO":  # a camera's MPO is one photo, with previews behind it
        raise PictureError(f"{name} has {frames} frames, and which one counts is unknown: save that one alone")
    _rescale_key(picture, name)
    upright = ImageOps.exif_transpose(picture)
    sixteen = upright.mode.startswith("I;16") or (upright.mode == "I" and picture.format == "PPM")
    if upright.mode in ("I", "F") and not sixteen:
        raise PictureError(f"{name} has 32 bits a channel, whose range is unknown: save it with 8 or 16")
    if sixteen:
        return _eight_bits(upright)
    if upright.mode == "La":  # grey times alpha: Pillow knows one way out of it
        upright = upright.convert("LA")
    shown = "RGBA" if upright.has_transparency_data else "RGB"
    return upright if upright.mode == shown else upright.convert(shown)


def _rescale_key(picture: Image.Image, name: str) -> None:
    """A PNG's transparent colour is stored with as many bits as its levels, which Pillow makes 8 of, but not of it."""
    key = picture.info.get("transparency")
    if picture.format != "PNG" or key is None or not picture.tile:  # without tiles, it was decoded elsewhere
        return
    stored = picture.tile[0][3]
    if stored in ("L;2", "L;4"):
        highest = 2 ** int(stored[-1]) - 1
        picture.info["transparency"] = (key & highest) * 255 // highest
    elif stored == "RGB;16B":  # of whose levels Pillow keeps the upper half alone
        raise PictureError(f"{name} has a transparent colour of 16 bits: save it with 8, or with an alpha channel")


def _eight_bits(grey: Image.Image) -> Image.Image:
    """16 bits of grey, of which Pillow would make white wherever they exceed 255; here 65535 is white."""
    levels = np.asarray(grey).astype(np.uint32)
    seen = Image.fromarray(((levels + 128) // 257).astype(np.uint8)).convert("RGB")
    if (clear := grey.info.get("transparency")) is not None:
        seen.putalpha(Image.fromarray((levels != clear).astype(np.uint8) * 255))
    return seen
