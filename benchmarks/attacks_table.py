"""Markdown of what `benchmarks.attacks` measured."""

from collections.abc import Callable, Iterator
import itertools
from typing import Any

from mpqfl_jax import errors

Row = dict[str, Any]


def key(row: Row) -> tuple[str, str, str]:
  """Which comparison a row is of."""
  return row["attack"], row["model"], row["search"]


def _pairs(rows: list[Row]) -> Iterator[tuple[Row, Row]]:
  """(ours, a peer's) of each comparison."""
  for _, group in itertools.groupby(rows, key):
    systems = list(group)
    for peer in systems[1:]:
      yield systems[0], peer


def markdown(rows: list[Row]) -> str:
  """The table of a file's rows: a line a comparison, ours first in each cell.

  Raises:
    UserError: no peer's row among them.
  """
  pairs = list(_pairs(rows))
  if not pairs:
    raise errors.UserError(
      "no row of a peer to put beside ours; expected a file that --json wrote"
      " with --peers or --suite."
    )

  def both(ours: Row, peer: Row, show: Callable[[Row], str]) -> str:
    return f"{show(ours)} / {show(peer)}"

  def figure(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"

  head = (
    *("attack", "model", "images", "labels", "steps"),
    *("ms a step", "s an image", "times as fast", "median PSNR, dB"),
    *("lowest, dB", "compiling, s"),
  )
  lines = [f"| {' | '.join(head)} |", f"| :-- | :-- {'| --: ' * 9}|"]
  for ours, peer in pairs:
    faster = peer["seconds_per_image"] / ours["seconds_per_image"]
    steps, each = "closed form", ""
    if max(ours["iterations"], peer["iterations"]) > 1:
      steps = both(ours, peer, lambda r: f"{r['iterations']:.0f}")
      each = both(ours, peer, lambda r: figure(r["ms_per_iteration_per_image"]))
    search = f"(search={ours['search']})" if ours["search"] else ""
    cells = (
      f"`{ours['attack']}{search}`",
      f"`{ours['model']}`",
      str(ours["images"]),
      "known" if ours["labels_known"] else "found",
      steps,
      each,
      both(ours, peer, lambda r: figure(r["seconds_per_image"])),
      figure(faster),
      both(ours, peer, lambda r: f"{r['psnr_db_median']:.1f}"),
      both(ours, peer, lambda r: f"{r['psnr_db_min']:.1f}"),
      both(ours, peer, lambda r: f"{r['compile_seconds']:.1f}"),
    )
    lines.append(f"| {' | '.join(cells)} |")
  versions = dict.fromkeys(r["version"] for pair in pairs for r in pair)
  data = dict.fromkeys(
    f"Test images of `{r['dataset']}` from number {r['first']} on"
    for r, _ in pairs
  )
  hosts = dict.fromkeys(
    r.get("device") or f"{r['cpu']}, {r['cores']} cores" for r, _ in pairs
  )
  lines += ["", f"{'; '.join((*data, *hosts, *versions))}."]
  return "\n".join(lines)
