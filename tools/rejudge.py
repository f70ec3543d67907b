"""Judges a study in results/ anew, by the rules as they are now.

    python -m tools.rejudge results/study_laptop

Verdicts are functions of what the study measured, which is in its committed
files: where a rule of `report/` changes, nothing has to be run again.
"""

import lzma
import pathlib
import shutil
import sys
import tempfile
import types
from typing import cast

from experiments import config, folder, study_results
from mpqfl_jax.report import study_tables
from tools import update_results


def rejudge(results: pathlib.Path, root: pathlib.Path) -> None:
  """Rewrites a study's summary, and its tables in the pages.

  Args:
    results: the study's folder in results/.
    root: the checkout.
  """
  with tempfile.TemporaryDirectory() as name:
    run_dir = pathlib.Path(name) / results.name
    shutil.copytree(results, run_dir)
    for packed in run_dir.glob("*.xz"):
      packed.with_suffix("").write_bytes(lzma.decompress(packed.read_bytes()))
    study = study_tables.read(run_dir)
    # An older study knows nothing of newer flags, of which none is read here.
    values = cast(config.Config, types.SimpleNamespace(**study.config))
    written = study_results.write(run_dir, values, study.results)
    folder.write_json(run_dir / "summary.json", {**study.summary, **written})
    update_results.update(run_dir, root)


if __name__ == "__main__":
  rejudge(pathlib.Path(sys.argv[1]), update_results.ROOT)
