"""What lies in results/reference comes from the notebooks as they are, or says that it does not."""

import html
import re
from pathlib import Path

import pytest

from focusdpo_lib.batch.notebooks import read

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "results" / "reference"
PAGES = sorted((REFERENCE / "notebooks").glob("*.html"))


def shown(page):
    """The code of every cell that a page shows."""
    cells = re.findall(r'<div class=" ?highlight hl-ipython3"><pre>(.*?)</pre>', page.read_text(), re.DOTALL)
    return {html.unescape(re.sub(r"<[^>]+>", "", cell)).strip() for cell in cells}


def changed(page):
    """Whether the page's notebook has another code cell than the page; given parameters stand beside the cell's own."""
    (book,) = (ROOT / "notebooks").glob(f"{page.name[:2]}_*.ipynb")
    return not {cell.source.strip() for cell in read(book).cells if cell.cell_type == "code"} <= shown(page)


def test_a_page_whose_notebook_has_changed_since_is_named_as_such():
    assert {page.name[:2] for page in PAGES} == {book.name[:2] for book in (ROOT / "notebooks").glob("*.ipynb")}
    said = re.search(r"^Pages older than their notebooks: (.+)\.$", (REFERENCE / "README.md").read_text(), re.MULTILINE)
    older = [page.stem for page in PAGES if changed(page)]
    assert said[1] == (", ".join(older) or "none"), "`make reference` makes them anew"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_page_shows_a_folder_of_the_machine_that_made_it(page):
    assert not re.search(r"/(home|root|tmp|Users|work)/", page.read_text())
