"""The vectors of many images, encoded in shares by several processes and put together by the one that scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from focusdpo_lib.evaluation.encoders import ClipEncoder, DinoEncoder, Encoders
from focusdpo_lib.runs import atomic
from focusdpo_lib.workers import SILENT, WHOLE, Progress, Shard

EMBEDDINGS = "embeddings"


def embed_into(
    folder: Path, encoders: Encoders, pictures: Sequence[Path], *, shard: Shard = WHOLE, progress: Progress = SILENT
) -> None:
    """Encodes the image files into folder/embeddings, a file a batch; those that are there are not made again.

    The batches are those of one call of an encoder, and so are the vectors, to the bit.
    """
    todo = [(at, batch) for at, batch in _batches(encoders, pictures) if not _file(folder, at).exists()]
    todo = [batch for batch in todo if batch[0] // encoders.dino.batch_size % shard[1] == shard[0]]
    progress.expects(sum(len(batch) for _, batch in todo))
    for at, batch in todo:
        progress.begins(str(batch[0]))
        vectors = {"dino": encoders.dino.images(batch), "clip": encoders.clip.images(batch)}
        with atomic(_file(folder, at)) as partial:
            save_file(vectors, partial)
        progress.done(len(batch))


def embedded(folder: Path, encoders: Encoders, pictures: Sequence[Path]) -> Encoders:
    """Encoders that know the vectors of these images, which `embed_into` made."""
    found = [load_file(_file(folder, at)) for at, _ in _batches(encoders, pictures)]
    known = {name: torch.cat([vectors[name] for vectors in found]) for name in ("dino", "clip")}
    dino, clip = (dict(zip(map(str, pictures), known[name], strict=True)) for name in ("dino", "clip"))
    return Encoders(Known(encoders.dino, dino), Known(encoders.clip, clip), encoders.reader)


@dataclass(frozen=True)
class Known:
    """An encoder that looks up the vectors of some images; whatever else it is asked it leaves to the encoder."""

    encoder: DinoEncoder | ClipEncoder
    vectors: Mapping[str, torch.Tensor]  # by path

    def images(self, pictures: Sequence) -> torch.Tensor:
        """N images → unit vectors (N, d)."""
        if all(isinstance(picture, Path) and str(picture) in self.vectors for picture in pictures):
            return torch.stack([self.vectors[str(picture)] for picture in pictures])
        return self.encoder.images(pictures)

    def __getattr__(self, name: str):
        return getattr(self.encoder, name)


def _batches(encoders: Encoders, pictures: Sequence[Path]) -> list[tuple[int, Sequence[Path]]]:
    size = encoders.dino.batch_size
    return [(at, pictures[at : at + size]) for at in range(0, len(pictures), size)]


def _file(folder: Path, at: int) -> Path:
    return Path(folder) / EMBEDDINGS / f"{at:09d}.safetensors"
