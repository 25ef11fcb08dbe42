"""`make data`, which is `python -m focusdpo_lib.evaluation.dreambench`: the DreamBooth dataset at one commit, checked.

The photos belong to those who took them (`LICENSE.md` and `dataset/references_and_licenses.txt`, which come along), so
the kit holds none of them, only their checksums. A file that is there and right is not fetched again, one that was cut
off goes on where it stopped, and none is there under its own name before its checksum was found right. A copy that
one has already, of photos of any size, is named by the environment variable DREAMBENCH_DIR.
"""

import argparse
import hashlib
import os
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

from focusdpo_lib.evaluation.benchmark import BenchmarkError, read_prompts_and_classes
from focusdpo_lib.params import DREAMBENCH_DIR
from focusdpo_lib.runs import LOCK, full_disk_is_said, locked

COMMIT = "4f887af7970a06fc0cd3adaa1d0b368547d6a1d0"  # of github.com/google/dreambooth
URL = f"https://raw.githubusercontent.com/google/dreambooth/{COMMIT}"
PLACE = Path("data") / "dreambench"  # from the project's folder, where params/paper looks for it
PART = ".part"  # of a file that is not whole yet
BLOCK = 1 << 20  # bytes


class File(NamedTuple):
    sha256: str
    size: int
    path: str


def manifest() -> list[File]:
    """Every file of the dataset with its checksum."""
    lines = (Path(__file__).with_suffix(".txt")).read_text(encoding="utf-8").splitlines()
    return [File(sha256, int(size), path) for sha256, size, path in (line.split(" ", 2) for line in lines)]


def fetch(folder: str | Path, files: Iterable[File], url: str = URL) -> list[str]:
    """Fetches what `folder` lacks of the files, or has otherwise; returns the paths of what was fetched.

    Raises BenchmarkError that lists every file that could not be fetched or whose checksum is another.
    """
    folder = Path(folder)
    fetched, failed = [], []
    with locked(folder / LOCK, f"another process fetches into {folder}: waiting for it"):
        for file in files:
            if _is(folder / file.path, file):
                continue
            if problem := _fetch(folder / file.path, file, url):
                failed.append(f"{file.path}: {problem}")
                if problem.startswith(UNREACHABLE):  # and so will the others be
                    break
            else:
                fetched.append(file.path)
    if failed:
        raise BenchmarkError(
            f"the dataset could not be fetched from {url} ({'; '.join(failed)}): run `make data` again, which goes on "
            f"where this stopped, where there is a network; or set {DREAMBENCH_DIR} to the folder of a copy"
        )
    return fetched


UNREACHABLE = "the server cannot be reached"


def _fetch(path: Path, file: File, url: str) -> str | None:
    """Fetches one file; what is wrong if it does not come. A part that does not lead to the file is fetched anew."""
    part = path.with_name(path.name + PART)
    path.parent.mkdir(parents=True, exist_ok=True)
    if part.exists() and part.stat().st_size >= file.size:
        part.unlink()
    for begun in dict.fromkeys([part.exists(), False]):
        if not begun:
            part.unlink(missing_ok=True)
        try:
            with full_disk_is_said(path):
                _download(f"{url}/{urllib.parse.quote(file.path)}", part)
        except urllib.error.HTTPError as error:
            if error.code != 416:  # the part is longer than the file
                return f"the server answers {error.code} {error.reason}"
        except urllib.error.URLError as error:
            return f"{UNREACHABLE} ({error.reason})"
        except (OSError, HTTPException) as error:
            return f"it broke off ({error or type(error).__name__})"
        if _is(part, file):
            os.replace(part, path)
            return None
        if part.exists() and part.stat().st_size < file.size:
            return f"{part.stat().st_size} of {file.size} bytes came"
    part.unlink(missing_ok=True)
    return f"its SHA-256 is not {file.sha256[:12]}… as of commit {COMMIT[:7]}"


def _download(url: str, part: Path) -> None:
    """Appends to a part what the server has of it from there on; begins anew where it sends the whole."""
    there = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={there}-"} if there else {})
    with urllib.request.urlopen(request, timeout=60) as answer, part.open("ab") as out:
        if answer.status != 206:
            out.truncate(0)
        while block := answer.read(BLOCK):
            out.write(block)


def _is(path: Path, file: File) -> bool:
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest() == file.sha256


def check_copy(folder: str | Path) -> str:
    """A sentence on a copy of one's own, whose photos may have another size. Raises BenchmarkError where one lacks."""
    folder, files = Path(folder), manifest()
    read_prompts_and_classes(folder / "dataset" / "prompts_and_classes.txt")
    photos = [file for file in files if file.path.endswith(".jpg")]
    if gone := [file.path for file in photos if not (folder / file.path).is_file()]:
        raise BenchmarkError(
            f"{folder} lacks {len(gone)} of the {len(photos)} photos of DreamBench ({', '.join(gone[:10])}): add them, "
            f"or unset {DREAMBENCH_DIR} and run `make data`"
        )
    same = sum(_is(folder / file.path, file) for file in photos)
    return f"{folder} has the {len(photos)} photos; {same} of them are those of commit {COMMIT[:7]} to the bit"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m focusdpo_lib.evaluation.dreambench", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--folder", type=Path, default=PLACE, help="where to put it (default: %(default)s)")
    folder = parser.parse_args().folder
    try:
        if copy := os.environ.get(DREAMBENCH_DIR):
            print(f"{check_copy(os.path.expanduser(copy))}; {DREAMBENCH_DIR} names it, so nothing is fetched")
            return
        files = manifest()
        fetched = fetch(folder, files)
    except BenchmarkError as error:
        sys.exit(str(error))
    print(f"{folder} holds the {len(files)} files of commit {COMMIT[:7]}, {len(fetched)} of them fetched now")


if __name__ == "__main__":
    main()
