"""Tests of examples/tour.ipynb: the notebook as it is stored, and that it runs.

Run them with `python -m pytest -m "" examples/tests/test_tour.py`.
"""

import json
import re
from pathlib import Path

import pytest

import dinoreg

NOTEBOOK = Path(__file__).parents[1] / "tour.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
TEXT = "\n\n".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown")


def test_every_cell_of_code_was_run_in_order():
    assert len(CODE) > 20
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    assert all(cell["outputs"] for cell in CODE)


def test_no_cell_failed_or_warned():
    for output in (output for cell in CODE for output in cell["outputs"]):
        assert output["output_type"] != "error" and output.get("name") != "stderr"


def test_the_notebook_has_no_traces_of_a_machine():
    text = json.dumps([[cell["source"], cell.get("outputs")] for cell in CELLS])
    text = re.sub(r'"image/png": "[^"]+"', "", text)
    assert not re.search(r"(?<![\w.\-/)\]])/(home|root|tmp|Users|usr|var|work|opt|private)\b", text)
    assert not re.search(r"\b[A-Z]:\\", text)
    assert all(cell["metadata"] == {} for cell in CELLS)


def test_the_notebook_is_small():
    assert NOTEBOOK.stat().st_size < 1_500_000


def test_the_names_it_points_to_are_in_the_file():
    sections = re.findall(r"^\*In the file: .+?\*$", TEXT, re.MULTILINE | re.DOTALL)
    assert len(sections) == 8
    for name in re.findall(r"`([\w.]+)`", " ".join(sections)):
        target = dinoreg
        for part in name.split("."):
            target = getattr(target, part)


def test_its_links_to_files_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    files = [link for link in links if not link.startswith("https://")]
    assert files and all((NOTEBOOK.parent / link).exists() for link in files)


def test_its_table_of_contents_lists_its_sections():
    sections = re.findall(r"^## (\d.+)$", TEXT, re.MULTILINE)
    assert re.findall(r"^\d\. \[(.+)\]\(#", TEXT, re.MULTILINE) == [x[3:] for x in sections]


@pytest.mark.slow
def test_the_notebook_runs():
    """All cells run in a fresh process, with a short training: the long one takes three minutes."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    for package in ("ipykernel", "matplotlib", "mlxtend"):
        pytest.importorskip(package)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (training,) = [cell for cell in notebook.cells if "steps=300" in cell.source]
    training.source = training.source.replace("steps=300", "steps=3")
    where = {"metadata": {"path": str(NOTEBOOK.parent)}}
    client = nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where)
    client.execute()
