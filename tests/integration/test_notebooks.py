"""The notebooks run from top to bottom on the embedded servers, and are kept with their outputs."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


def printed(notebook: nbformat.NotebookNode) -> list[str]:
    """What each code cell prints to its standard output."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return ["".join(o.text for o in cell.outputs if o.get("name") == "stdout") for cell in cells]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_a_notebook_runs_and_prints_what_it_is_kept_with(path: Path, tmp_path: Path) -> None:
    """What a reader sees in the repository is what they get; only ids and paths differ."""
    kept = nbformat.read(path, as_version=4)
    fresh = nbformat.read(path, as_version=4)

    NotebookClient(fresh, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()

    assert any(printed(kept)), "the notebook is kept without its outputs"
    for before, after in zip(printed(kept), printed(fresh), strict=True):
        if "id=" not in before and "Writing" not in after:
            assert after == before
