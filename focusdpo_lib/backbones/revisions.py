"""Which commit of a hub model a folder of results stands on: chosen once, then kept."""

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.file_download import repo_folder_name

from focusdpo_lib import params
from focusdpo_lib.runs import write_text

HUB_ID = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*(?<!\.safetensors)")
REVISIONS = {"model": "revision", "subject_lora": "subject_revision", "ip_adapter": "ip_revision"}
PINS = "revisions"  # in a results folder: a file for each hub model that the settings give no revision of


def is_hub_id(name: str) -> bool:
    return bool(HUB_ID.fullmatch(name)) and not Path(name).exists()


def pinned(settings: params.Backbone, results: str | Path) -> params.Backbone:
    """The settings with a revision for every hub model: their own, or the commit that `results` is pinned to.

    The first run that needs a model pins it: to the newest commit in the local cache, or else to the hub's. The file
    travels with the results, so every later run of them, on any machine, takes the same weights. A model of which no
    commit can be learned stays as it is; loading it says why.
    """
    found = {}
    for name, revision in REVISIONS.items():
        source = getattr(settings, name)
        if source and getattr(settings, revision) is None and is_hub_id(source):
            pin = Path(results) / PINS / repo_folder_name(repo_id=source, repo_type="model")
            if not pin.is_file() and (commit := newest(source)):
                write_text(pin, f"{commit}\n")
            if pin.is_file():
                found[revision] = pin.read_text(encoding="utf-8").strip()
    return settings.model_copy(update=found)


def newest(source: str) -> str | None:
    """The commit of a hub model that the cache holds as its newest, or the hub's; none: neither can be learned."""
    for cached in (True, False):
        try:
            return Path(snapshot_download(source, allow_patterns=[], local_files_only=cached)).name
        except OSError:  # not in the cache, offline, unreachable, gated, unknown: loading will say so
            pass
    return None
