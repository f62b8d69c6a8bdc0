"""The notebooks run, warn of nothing, and are kept as they ran.

uv run --group docs pytest tests/test_notebooks.py
"""

import ast
import re
from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient", reason="needs `--group docs`")
nbformat = pytest.importorskip("nbformat")

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
COLAB = "https://colab.research.google.com/github/ngalore-jax/ngalore-jax/blob/main"
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def code_cells(path):
    cells = nbformat.read(path, as_version=4).cells
    return [cell for cell in cells if cell.cell_type == "code"]


def test_there_are_seven():
    assert [path.stem[0] for path in NOTEBOOKS] == list("1234567")


@every_notebook
def test_it_runs_without_a_warning(path, monkeypatch):
    # libtpu, which is installed for notebook 6, would look for a TPU in all of them.
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(ROOT)}}
    nbclient.NotebookClient(notebook, timeout=600, resources=where).execute()
    warned = [
        output.text
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "stream" and output.name == "stderr"
    ]
    assert not warned


@every_notebook
def test_its_outputs_are_kept(path):
    nbformat.validate(nbformat.read(path, as_version=4))
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output.get("name") == "stderr" for output in outputs)
    for cell in cells:
        if any("image/png" in output.get("data", {}) for output in cell.outputs):
            assert cell.metadata["mystnb"]["image"]["alt"]
    shown = str(outputs)
    assert "/tmp" not in shown and str(Path.home()) not in shown


@every_notebook
def test_it_opens_in_colab_and_installs_there_alone(path):
    first, *_ = nbformat.read(path, as_version=4).cells
    assert first.source.startswith("[![Open in Colab]")
    assert f"({COLAB}/notebooks/{path.name})" in first.source.splitlines()[0]
    install, *others = code_cells(path)
    assert 'if "google.colab" in sys.modules:' in install.source
    assert "pip install" in install.source
    assert not any("pip install" in cell.source for cell in others)


@every_notebook
def test_its_links_lead_somewhere(path):
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown":
            for link in re.findall(r"\]\(([^)#]+)[^)]*\)", cell.source):
                found = link.startswith("https://") or (path.parent / link).exists()
                assert found, link


@every_notebook
def test_it_has_no_optimizer_of_its_own(path):
    for cell in code_cells(path)[1:]:
        names = {
            node.attr
            for node in ast.walk(ast.parse(cell.source))
            if isinstance(node, ast.Attribute)
        }
        assert not names & {"GradientTransformation", "GradientTransformationExtraArgs"}
