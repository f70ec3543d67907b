"""Copies a finished run's small files to results/ and its table to the pages.

    python -m tools.update_results runs/quickstart

No figure is typed by hand: a table stands between two comments that name the
run, in the README or a page of docs/, and is written from the run's files.
"""

from collections.abc import Callable
import json
import lzma
import pathlib
import shutil
import sys

from benchmarks import page
from mpqfl_jax.report import scaling, study_tables, tables

ROOT = pathlib.Path(__file__).resolve().parents[1]
KEPT = (
  *("config.json", "summary.json", "metrics.jsonl", "attacks.jsonl"),
  *("scaling.jsonl", "study.jsonl", "training.jsonl", "evidence.json"),
  "costs.jsonl",
)
# Larger files are compressed.
MOST_BYTES = 1_000_000


def _tables(run_dir: pathlib.Path) -> dict[str, Callable[[], str]]:
  """Name between the comments -> what stands there: what the run prints.

  Of a study, `NAME claims` are the verdicts alone, and `NAME defenses`,
  `NAME costs`, `NAME gains` and `NAME settings` are tables of their own.
  """
  summary = json.loads((run_dir / "summary.json").read_text())
  name = run_dir.name
  if summary["task"] == "study":
    return {
      name: lambda: study_tables.markdown(run_dir),
      f"{name} claims": lambda: study_tables.claims_markdown(
        study_tables.read(run_dir)
      ),
      f"{name} defenses": lambda: study_tables.defenses_markdown(
        study_tables.read(run_dir)
      ),
      f"{name} costs": lambda: study_tables.costs_markdown(
        study_tables.read(run_dir)
      ),
      f"{name} settings": lambda: study_tables.settings_markdown(
        study_tables.read(run_dir)
      ),
      f"{name} gains": lambda: study_tables.gains_markdown(
        study_tables.read(run_dir)
      ),
    }
  if summary["task"] == "scaling":
    return {name: lambda: scaling.markdown(summary["scaling"])}
  return {name: lambda: tables.markdown(summary)}


def _forget_data_dir(path: pathlib.Path) -> None:
  """A folder of this machine is no part of a result."""
  config = json.loads(path.read_text())
  config["data_dir"] = None
  config["command"] = [
    word for word in config["command"] if not word.startswith("--data_dir")
  ]
  path.write_text(json.dumps(config, indent=2) + "\n")


def update(run_dir: pathlib.Path, root: pathlib.Path = ROOT) -> None:
  """Copies what is kept of a run and rewrites its table in the pages.

  Args:
    run_dir: a finished run; its name is the name of the results.
    root: the checkout.
  """
  target = root / "results" / run_dir.name
  target.mkdir(parents=True, exist_ok=True)
  for name in KEPT:
    source = run_dir / name
    if source.is_file() and source.stat().st_size <= MOST_BYTES:
      shutil.copyfile(source, target / name)
    elif source.is_file():
      packed = lzma.compress(source.read_bytes())
      (target / f"{name}.xz").write_bytes(packed)
  _forget_data_dir(target / "config.json")
  for path in sorted((run_dir / "figures").glob("*.png")):
    if "_blind_" not in path.name:  # the walls of a study are large
      shutil.copyfile(path, target / path.name)
  for path in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
    for name, text in _tables(run_dir).items():
      if f"<!-- {name}: begin -->" in path.read_text():
        page.put(path, name, text())


if __name__ == "__main__":
  update(pathlib.Path(sys.argv[1]))
