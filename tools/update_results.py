"""Copies a finished run's small files to results/ and its table to README.md.

    python -m tools.update_results runs/quickstart

No figure in the README is typed by hand: the table stands between two comments
that name the run, and is written from its `summary.json`.
"""

import json
import pathlib
import shutil
import sys

from benchmarks import page
from mpqfl_jax.report import tables

ROOT = pathlib.Path(__file__).resolve().parents[1]
KEPT = ("config.json", "summary.json", "metrics.jsonl", "attacks.jsonl")


def update(run_dir: pathlib.Path, root: pathlib.Path = ROOT) -> None:
  """Copies what is kept of a run and rewrites its table in the README.

  Args:
    run_dir: a finished run; its name is the name of the results.
    root: the checkout.
  """
  target = root / "results" / run_dir.name
  target.mkdir(parents=True, exist_ok=True)
  for name in KEPT:
    if (run_dir / name).is_file():
      shutil.copyfile(run_dir / name, target / name)
  for path in sorted((run_dir / "figures").glob("*.png")):
    shutil.copyfile(path, target / path.name)
  readme = root / "README.md"
  if f"<!-- {run_dir.name}: begin -->" in readme.read_text():
    summary = json.loads((run_dir / "summary.json").read_text())
    page.put(readme, run_dir.name, tables.markdown(summary))


if __name__ == "__main__":
  update(pathlib.Path(sys.argv[1]))
