"""Which commit of a hub model a folder of results stands on: chosen once, then kept."""

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import validate_repo_id

from focusdpo_lib import params
from focusdpo_lib.runs import LOCK, home, locked, write_text

Settings = TypeVar("Settings", bound=params.Section)
REVISIONS = {"model": "revision", "subject_lora": "subject_revision", "ip_adapter": "ip_revision"}
PINS = "revisions"  # in a results folder: a file for each hub model that the settings give no revision of


def is_hub_id(name: str) -> bool:
    """Whether a name is "owner/model" and no file or folder."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not name.endswith(".safetensors") and not Path(name).exists()


def pinned(settings: params.Backbone, results: str | Path) -> params.Backbone:
    """The settings with a revision for every hub model: their own, or the commit that `results` is pinned to.

    The first run that needs a model pins it: to the newest commit in the local cache, or else to the hub's. The file
    travels with the results, so every later run of them, on any machine, takes the same weights. A model of which no
    commit can be learned stays as it is; loading it says why.
    """
    return with_commits(settings, {field: getattr(settings, name) for name, field in REVISIONS.items()}, results)


def with_commits(settings: Settings, sources: Mapping[str, str | None], results: str | Path) -> Settings:
    """As `pinned`, of any section: `sources` are its models, by the field that holds their revision."""
    found = {
        field: pin(source, results)
        for field, source in sources.items()
        if source and getattr(settings, field) is None and is_hub_id(source)
    }
    return settings.model_copy(update={field: commit for field, commit in found.items() if commit})


def pin(source: str, results: str | Path) -> str | None:
    """The commit of a hub model that `results` is pinned to, and is from now on; None where none can be learned."""
    return _pin(source, home(results) / PINS)


def _pin(source: str, folder: Path) -> str | None:
    pin = folder / _folder_name(source)
    if not pin.is_file() and (commit := newest(source)):
        with locked(folder / LOCK, f"another process pins a model in {folder}: waiting for it"):
            if not pin.is_file():  # of two that begin together, the first decides
                write_text(pin, f"{commit}\n")
    return pin.read_text(encoding="utf-8").strip() if pin.is_file() else None


def newest(source: str) -> str | None:
    """The commit that the cache has for a hub model's "main", or that the hub has; none: neither can be learned."""
    cached = Path(constants.HF_HUB_CACHE) / _folder_name(source) / "refs" / "main"
    if cached.is_file():
        return cached.read_text(encoding="utf-8").strip()
    try:
        return HfApi().model_info(source).sha
    except Exception:  # offline, unreachable, gated, unknown, …: loading meets it again and says what to do
        return None


def _folder_name(source: str) -> str:
    return repo_folder_name(repo_id=source, repo_type="model")
