"""Every notebook runs from top to bottom and holds no outputs."""

import pathlib

import nbclient
import nbformat
import pytest

NOTEBOOKS = sorted(
  (pathlib.Path(__file__).parents[1] / "notebooks").glob("*.ipynb")
)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_outputs_are_stripped(path):
  notebook = nbformat.read(path, as_version=4)
  nbformat.validate(notebook)
  for cell in notebook.cells:
    if cell.cell_type == "code":
      assert not cell.outputs and cell.execution_count is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_begins_with_a_badge_then_installs_and_says_where_it_runs(path):
  about, install, *_ = nbformat.read(path, as_version=4).cells
  title, _, badge, *_ = about.source.split("\n")
  assert title.startswith("# ")
  assert "colab-badge.svg)](https://colab.research.google.com/" in badge
  assert '"pip", "install"' in install.source
  assert "jax.devices()" in install.source and "runs on" in install.source


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
  monkeypatch.setenv("MPQFL_NOTEBOOK_ROUNDS", "4")
  monkeypatch.setenv("PYTHONPATH", str(path.parents[1]))
  notebook = nbformat.read(path, as_version=4)
  nbclient.NotebookClient(
    notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}
  ).execute()
  shown = [
    output
    for cell in notebook.cells
    if cell.cell_type == "code"
    for output in cell.outputs
    if "image/png" in output.get("data", {})
  ]
  assert shown, "a notebook ends with a picture worth keeping"
