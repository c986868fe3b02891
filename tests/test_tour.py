"""examples/tour.ipynb runs from top to bottom and shows what it showed when it was written."""

import contextlib
import json
import os
import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

TOUR = Path(__file__).parents[1] / "examples" / "tour.ipynb"


def shown(cell):
    """What a cell printed, without numbers, which differ between machines, and how many pictures it showed."""
    text = "".join(output.get("text", "") or output.get("data", {}).get("text/plain", "")
                   for output in cell.outputs if output.get("name") != "stderr")
    pictures = sum("image/png" in output.get("data", {}) for output in cell.outputs)
    return re.sub(r"[\d.]+|/\S+", "", text).split(), pictures


@contextlib.contextmanager
def one_core():
    """Processes that start within it have one thread: beside other tests a second one makes training slower."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


@pytest.mark.slow
def test_every_cell_shows_what_it_showed(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    before, now = nbformat.read(TOUR, 4), nbformat.read(TOUR, 4)
    with one_core():
        nbclient.NotebookClient(now, timeout=300, resources=dict(metadata=dict(path=TOUR.parent))).execute()
    for old, new in zip(before.cells, now.cells):
        if old.cell_type == "code" and "train.py" not in old.source:  # its table depends on the machine's arithmetic
            assert shown(new) == shown(old), old.source


def test_outputs_are_kept_and_hold_no_path_of_a_machine():
    cells = [cell for cell in json.loads(TOUR.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert sum(bool(cell["outputs"]) for cell in cells) >= len(cells) - 1
    assert not re.search(r"/(tmp|home|root|work)/", json.dumps([cell["outputs"] for cell in cells]))
