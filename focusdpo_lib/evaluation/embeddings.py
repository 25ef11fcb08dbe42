"""Vectors are made once: a folder of them for each encoder, by the content of what was encoded.

So a photo or prompt is encoded for the first row alone, an image for its first scoring, and any number of processes
and runs may share the folder: files appear whole, under names that follow from what is in them. An encoder of which it
is not known which weights it has (a hub's, at no known commit) has no such folder.
"""

import hashlib
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import chain, zip_longest
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from focusdpo_lib.evaluation.benchmark import open_image
from focusdpo_lib.evaluation.encoders import ClipEncoder, DinoEncoder, Encoders, Picture, ahead, unit
from focusdpo_lib.runs import atomic
from focusdpo_lib.workers import SILENT, WHOLE, Progress, Shard

EMBEDDINGS = "embeddings"
VERSION = "1"  # of how a picture becomes a vector here: a change of it forgets what was made before
KEY = 32  # bytes


def kept(encoders: Encoders, folder: Path, passing: Path | None = None) -> Encoders:
    """The encoders, which look into `folder` first; one of unknown weights into `passing`, or into none."""
    known = {"dino": encoders.dino, "clip": encoders.clip}
    for name, encoder in known.items():
        place = folder if "@" in encoder.id else passing
        if place is not None and not isinstance(encoder, Kept):
            known[name] = Kept(encoder, place_of(place, encoder.id))
    return replace(encoders, **known)


def embed(work: Sequence[tuple["Kept", Sequence[Sequence[Path]]]], progress: Progress = SILENT) -> None:
    """Encodes batches of files by encoders that keep their vectors, the first batch of each, then the second, …

    So a file that several encoders lack is opened once, and no more than a batch of each lies in memory beside that
    which is computed.
    """
    lots = list(zip_longest(*(batches for _, batches in work), fillvalue=()))
    wanted = [{file: [i for i, batch in enumerate(lot) if file in batch] for file in chain(*lot)} for lot in lots]

    def prepare(asked: tuple[Path, list[int]]) -> dict[int, torch.Tensor]:
        image = open_image(asked[0])
        return {i: work[i][0].prepare(image) for i in asked[1]}

    prepared = ahead([list(files.items()) for files in wanted], prepare, work[0][0].device)
    for lot, files, pixels in zip(lots, wanted, prepared, strict=True):
        found = dict(zip(files, pixels, strict=True))
        for i, batch in enumerate(lot):
            if batch:
                progress.begins(str(batch[0]))
                work[i][0].keep(batch, torch.stack([found[file][i] for file in batch]))
                progress.done(len(batch))


def place_of(folder: Path, encoder: str) -> Path:
    """The folder of an encoder's vectors, by its id."""
    digest = hashlib.sha256(f"{VERSION} {encoder}".encode()).hexdigest()
    readable = re.sub(r"[^\w.-]+", "-", encoder)[:60]
    return Path(folder) / f"{readable}-{digest[:12]}"


class Kept:
    """An encoder with a folder of vectors; whatever else it is asked than vectors it leaves to the encoder."""

    def __init__(self, encoder: DinoEncoder | ClipEncoder, folder: Path):
        self.encoder, self.folder = encoder, Path(folder)
        self._where: dict[bytes, tuple[Path, int]] = {}
        self._read: set[Path] = set()

    def images(self, pictures: Sequence[Picture]) -> torch.Tensor:
        """N images → unit vectors (N, d)."""
        return self._vectors(pictures, _key_of_picture, self.encoder.images)

    def texts(self, prompts: Sequence[str]) -> torch.Tensor:
        """N prompts → unit vectors (N, d)."""
        return self._vectors(prompts, _key_of_text, self.encoder.texts)

    def missing(self, pictures: Sequence[Picture]) -> list[Picture]:
        """Those of which there is no vector yet, each content once."""
        keys = dict(reversed([(_key_of_picture(picture), picture) for picture in pictures]))
        self._look()
        return [keys[key] for key in dict.fromkeys(map(_key_of_picture, pictures)) if key not in self._where]

    def batches(self, pictures: Sequence[Picture], shard: Shard = WHOLE) -> list[Sequence[Picture]]:
        """A shard's batches, of those that one call of the encoder has: so vectors are the same to the bit."""
        size = self.encoder.batch_size
        return [pictures[at : at + size] for at in range(0, len(pictures), size)][shard[0] :: shard[1]]

    def keep(self, pictures: Sequence[Picture], pixels: torch.Tensor) -> None:
        """Encodes prepared pictures as one batch and keeps their vectors."""
        vectors = unit(self.encoder.kind, self.encoder.vectors(pixels), pictures)
        self._keep([_key_of_picture(picture) for picture in pictures], vectors)

    def __getattr__(self, name: str):
        return getattr(self.encoder, name)

    def _vectors(self, items: Sequence, key_of: Callable, encode: Callable) -> torch.Tensor:
        items = list(items)
        keys = [key_of(item) for item in items]
        self._look()
        new = {key: item for key, item in zip(reversed(keys), reversed(items), strict=True) if key not in self._where}
        todo = [key for key in dict.fromkeys(keys) if key in new]
        for batch in self.batches(todo):
            self._keep(batch, encode([new[key] for key in batch]))
        return self._stored(keys)

    def _keep(self, keys: Sequence[bytes], vectors: torch.Tensor) -> None:
        packed = torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).reshape(-1, KEY)
        path = self.folder / f"{hashlib.sha256(b''.join(keys)).hexdigest()[:32]}.safetensors"
        with atomic(path) as partial:
            save_file({"keys": packed, "vectors": vectors.contiguous()}, partial)
        self._read.discard(path)
        self._look()

    def _look(self) -> None:
        """Reads which vectors are in files that were not there before; a damaged one counts as none."""
        for path in sorted(set(self.folder.glob("*.safetensors")) - self._read):
            self._read.add(path)
            try:
                with safe_open(path, "pt") as file:
                    keys = file.get_tensor("keys").numpy()
                    if len(file.get_slice("vectors").get_shape()) != 2:
                        raise ValueError("its vectors are none")
            except (SafetensorError, OSError, ValueError, RuntimeError) as error:
                warnings.warn(f"{path} cannot be read ({error}), so its vectors are made again", stacklevel=4)
                continue
            self._where |= {key.tobytes(): (path, row) for row, key in enumerate(keys)}

    def _stored(self, keys: Sequence[bytes]) -> torch.Tensor:
        files = {}
        for path in dict.fromkeys(self._where[key][0] for key in keys):
            with safe_open(path, "pt") as file:
                files[path] = file.get_tensor("vectors")
        return torch.stack([files[path][row] for path, row in (self._where[key] for key in keys)])


def _key_of_text(text: str) -> bytes:
    return hashlib.sha256(b"text " + text.encode()).digest()


def _key_of_picture(picture: Picture) -> bytes:
    """By a file's bytes, whatever it is called, or by the pixels of an image that was made here."""
    if isinstance(picture, Image.Image):
        return hashlib.sha256(f"pixels {picture.mode} {picture.size} ".encode() + picture.tobytes()).digest()
    try:
        state = Path(picture).stat()
    except OSError:  # whoever opens it says why
        return hashlib.sha256(f"missing {picture}".encode()).digest()
    return _key_of_file(str(picture), state.st_mtime_ns, state.st_size, state.st_ino)


@lru_cache(maxsize=200_000)
def _key_of_file(path: str, *state: int) -> bytes:
    return hashlib.sha256(b"file " + Path(path).read_bytes()).digest()
