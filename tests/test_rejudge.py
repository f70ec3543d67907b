"""The verdicts in results/ are those of the rules as they are now."""

import json
import math
import pathlib
import shutil

import pytest

from tools import rejudge

ROOT = pathlib.Path(__file__).parents[1]
STUDIES = sorted(path.name for path in (ROOT / "results").glob("study_*"))
QUICK = "study_private"


def alike(a, b):
  """Equal, but for how another processor rounds sums."""
  if isinstance(a, dict):
    return a.keys() == b.keys() and all(alike(a[k], b[k]) for k in a)
  if isinstance(a, list):
    return len(a) == len(b) and all(map(alike, a, b))
  if isinstance(a, float) and isinstance(b, float):
    return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)
  return a == b


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(name, marks=[] if name == QUICK else [pytest.mark.slow])
    for name in STUDIES
  ],
)
def test_committed_verdicts_follow_todays_rules(name, tmp_path):
  for part in ("README.md", "docs"):
    source = ROOT / part
    copy = shutil.copytree if source.is_dir() else shutil.copyfile
    copy(source, tmp_path / part)
  folder = tmp_path / "results" / name
  shutil.copytree(ROOT / "results" / name, folder)
  rejudge.rejudge(folder, tmp_path)
  again = json.loads((folder / "summary.json").read_text())
  committed = ROOT / "results" / name / "summary.json"
  assert alike(again, json.loads(committed.read_text()))
  # Nor is a table in the pages another one.
  for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
    rewritten = tmp_path / page.relative_to(ROOT)
    assert rewritten.read_text() == page.read_text(), page


def test_there_are_studies():
  assert QUICK in STUDIES and len(STUDIES) >= 6
