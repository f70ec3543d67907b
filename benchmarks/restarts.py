"""How much longer a search takes from more starting points.

    python -m benchmarks.restarts --json=results/attacks/restarts.json \
      --page=docs/attacks.md

One undefended update of one test image at initial weights, with its label. Each
search is run from one starting point and from more, on at most --devices CPU
devices with at most --widths lanes each; no more devices and lanes are used
than there are starting points. The fastest of --repeats runs counts, without
compilation. A width of 1 runs searches one after the other on each device, more
of them vectorised, side by side.
"""

import argparse
from collections.abc import Sequence
import json
import os
import pathlib
from typing import Any

import jax
import numpy as np

from benchmarks import attacks_task, page
from mpqfl_jax import attacks, errors, exact, host, specs
from mpqfl_jax.report import tables

Row = dict[str, Any]
SEARCHES = (
  "lenet_zhu:dlg,"
  "lenet_zhu:inverting_gradients(iterations=1000),"
  "lenet_zhu:map(iterations=200),"
  "resnet20:inverting_gradients(iterations=100)"
)


def measure(
  search: str,
  dataset: str,
  first: int,
  restarts: list[int],
  widths: list[int],
  repeats: int,
  devices: Sequence[jax.Device] | None = None,
) -> list[Row]:
  """A row for each width and number of restarts.

  Args:
    search: `model:attack` or `model:attack(key=value,...)`.
    dataset: an embedded data set.
    first: number of the test image.
    restarts: numbers of starting points.
    widths: lanes on a device.
    repeats: runs, of which the fastest counts.
    devices: default all.

  Raises:
    UserError: unknown names or settings.
  """
  name, _, spec = search.partition(":")
  model, params, data = attacks_task.make(name, dataset, 0)
  kind, settings = specs.parse(spec)
  attack = attacks.make(
    kind, model, auxiliary=np.asarray(data.x_train), **settings
  )
  if not isinstance(attack, attacks.Attack) or attack.iterations < 2:
    raise errors.UserError(
      f"{kind} does not search from starting points. Expected dlg, map or"
      " another search."
    )
  x = data.x_test[first : first + 1] / np.float32(255)
  y = np.asarray(data.y_test[first : first + 1])
  observation = attacks_task.observed(model, params, x, y, labels_known=True)
  rows = []
  for width in widths:
    for count in restarts:
      # The first run compiles.
      runs = [
        attacks.run(
          attack,
          observation,
          jax.random.key(0),
          restarts=count,
          devices=devices,
          width=width,
          progress=False,
        )
        for _ in range(repeats + 1)
      ][1:]
      rows.append(
        {
          "model": name,
          "attack": spec,
          "width": width,
          "restarts": count,
          "seconds": min(run.seconds for run in runs),
          "steps": int(runs[0].iterations[0]),
          "objective": float(runs[0].objective[0]),
        }
      )
  return rows


def markdown(rows: list[Row]) -> str:
  """A line a search and width: seconds, and how many times those of one."""
  counts = sorted({row["restarts"] for row in rows})
  table: list[list[str]] = [
    ["Model", "Search", "Lanes a device, at most", *(f"{n}" for n in counts)],
    [":--", ":--", *["--:"] * (len(counts) + 1)],
  ]
  groups = dict.fromkeys((r["model"], r["attack"], r["width"]) for r in rows)
  for group in groups:
    found = {
      r["restarts"]: r["seconds"]
      for r in rows
      if (r["model"], r["attack"], r["width"]) == group
    }
    # Of one starting point, however many lanes would have been free.
    alone = min(
      r["seconds"]
      for r in rows
      if (r["model"], r["attack"]) == group[:2] and r["restarts"] == counts[0]
    )
    cells = [f"{s:.2g} ({s / alone:.1f})" for _, s in sorted(found.items())]
    model, attack, width = group
    table.append([f"`{model}`", f"`{attack}`", str(width), *cells])
  return tables.joined(table)


def main() -> None:
  """Measures every search, prints the table and puts it into a page."""
  flags = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  flags.add_argument("--searches", default=SEARCHES)
  flags.add_argument("--dataset", default="cifar10_sample")
  flags.add_argument("--first", type=int, default=500, help="Test image.")
  flags.add_argument("--restarts", default="1,2,8")
  flags.add_argument("--widths", default="1,8")
  flags.add_argument("--devices", type=int, default=2, help="CPU devices.")
  flags.add_argument("--repeats", type=int, default=2)
  flags.add_argument("--json", help="Also write the rows to this file.")
  flags.add_argument("--page", help="Put the table into this page.")
  args = flags.parse_args()
  jax.config.update("jax_num_cpu_devices", args.devices)
  restarts, widths = (
    [int(word) for word in text.split(",")]
    for text in (args.restarts, args.widths)
  )
  rows: list[Row] = []
  try:
    for search in specs.split(args.searches):
      rows += measure(
        search, args.dataset, args.first, restarts, widths, args.repeats
      )
      print(markdown(rows[-len(restarts) * len(widths) :]), flush=True)
  except errors.UserError as error:
    flags.error(str(error))
  if args.json:
    pathlib.Path(args.json).write_text(json.dumps(rows, indent=2) + "\n")
  if args.page:
    where = f"{host.processor()}, {os.cpu_count()} cores."
    page.put(
      pathlib.Path(args.page), "restarts", f"{markdown(rows)}\n\n{where}"
    )


if __name__ == "__main__":
  host.restart()
  with exact.products():
    main()
