"""Predicted leakage beside what a study's attack reached, as a table.

    python -m tools.compare_leakage results/study_laptop runs/leakage_mnist ...

The folders after the study's are runs of `--task=leakage` on images that it
attacked, one a data set; only these count. The table goes to docs/attacks.md.
"""

from collections.abc import Iterator
import json
import lzma
import pathlib
import statistics
import sys

from benchmarks import page
from mpqfl_jax import specs
from mpqfl_jax.report import tables

PAGE = pathlib.Path(__file__).resolve().parents[1] / "docs" / "attacks.md"


def reached(
  study: pathlib.Path, images: dict[str, set[str]]
) -> dict[tuple[str, str], float]:
  """(data set, defence) -> median PSNR of `map` that knows the defence, dB.

  With its Gaussian prior, which is the one that the prediction is made for.

  Args:
    study: its folder.
    images: data set -> those that count.
  """
  plain = study / "attacks.jsonl"
  text = (
    plain.read_text()
    if plain.is_file()
    else lzma.decompress((study / "attacks.jsonl.xz").read_bytes()).decode()
  )
  found: dict[tuple[str, str], list[float]] = {}
  for line in map(json.loads, text.splitlines()):
    name, options = specs.parse(line["attack"])
    who = (name, line["knowledge"], line["weights"])
    mine = line["image"] in images.get(line["dataset"], ())
    gaussian = options.get("prior", "gaussian") == "gaussian"
    if mine and gaussian and who == ("map", "adaptive", "initial"):
      key = line["dataset"], line["defense"]
      found.setdefault(key, []).append(line["psnr_db"])
  return {key: statistics.median(values) for key, values in found.items()}


def markdown(study: pathlib.Path, runs: list[pathlib.Path]) -> str:
  """A line a defence, a pair of columns a data set."""
  predicted, images = {}, {}
  for run in runs:
    name = json.loads((run / "config.json").read_text())["dataset"]
    predicted[name] = json.loads((run / "summary.json").read_text())["defenses"]
    lines = (run / "leakage.jsonl").read_text().splitlines()
    images[name] = {json.loads(line)["image"] for line in lines}
  attacked = reached(study, images)
  head = [
    "Defence",
    *(f"{name}: predicted / reached, dB" for name in predicted),
  ]
  rows = [head, [":--", *["--:"] * len(predicted)]]
  rows += _rows(attacked, predicted)
  return tables.joined(rows)


def _rows(attacked, predicted) -> Iterator[list[str]]:
  for spec in next(iter(predicted.values())):
    cells = []
    for name, found in predicted.items():
      value = found[spec]["psnr_db_predicted_median"]
      cells.append(f"{value:.1f} / {attacked[name, spec]:.1f}")
    yield [spec, *cells]


if __name__ == "__main__":
  folders = [pathlib.Path(word) for word in sys.argv[1:]]
  page.put(PAGE, "leakage", markdown(folders[0], folders[1:]))
