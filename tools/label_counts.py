"""How many labels of a batch an attacker reads, as a table.

    python -m tools.label_counts runs/labels_mnist runs/labels_cifar10 ...

The folders are runs of `--task=attack`, blind and adaptive. The table goes to
docs/attacks.md.
"""

import collections
import json
import pathlib
import statistics
import sys

from benchmarks import page
from mpqfl_jax.report import tables

KNOWLEDGE = ("blind", "adaptive")
PAGE = pathlib.Path(__file__).resolve().parents[1] / "docs" / "attacks.md"


def accuracy(run: pathlib.Path) -> dict[tuple[str, str], float]:
  """(defence, knowledge) -> share of the labels that were found.

  Args:
    run: its folder. Every image of a batch has the accuracy of its batch.
  """
  found = collections.defaultdict(list)
  for line in (run / "attacks.jsonl").read_text().splitlines():
    each = json.loads(line)
    found[each["defense"], each["knowledge"]].append(each["label_accuracy"])
  return {key: statistics.mean(values) for key, values in found.items()}


def markdown(runs: list[pathlib.Path]) -> str:
  """A line a defence, a column a run: blind and adaptive."""
  configs = [json.loads((run / "config.json").read_text()) for run in runs]
  found = [accuracy(run) for run in runs]
  head = [
    "Defence",
    *(f"{c['dataset']}, {c['model']}: blind / adaptive, %" for c in configs),
  ]
  rows = [head, [":--", *["--:"] * len(runs)]]
  for spec in configs[0]["defense"]:
    cells = [
      " / ".join(f"{100 * each[spec, who]:.0f}" for who in KNOWLEDGE)
      for each in found
    ]
    rows.append([spec, *cells])
  return tables.joined(rows)


if __name__ == "__main__":
  page.put(PAGE, "labels", markdown([pathlib.Path(w) for w in sys.argv[1:]]))
