"""What each defence costs, as a table and a page: bytes, seconds, keys."""

from collections.abc import Iterator, Sequence
import pathlib
from typing import Any, NamedTuple

import numpy as np

from mpqfl_jax.report import figures, page, records, style, tables

Line = dict[str, Any]


class Row(NamedTuple):
  """A defence's costs as text."""

  defense: str
  uplink: str
  downlink: str
  train: str
  send: str
  server: str
  keys: str


HEADINGS = Row(
  defense="Defence",
  uplink="Uplink, bytes",
  downlink="Downlink, bytes",
  train="Client trains, ms",
  send="Client protects and packs, ms",
  server="Server, ms a client",
  keys="Keys",
)


def rows(lines: Sequence[Line]) -> Iterator[Row]:
  """The lines of `costs.jsonl` as text."""
  for line in lines:
    yield Row(
      defense=line["defense"],
      uplink=f"{line['uplink_bytes']:,}",
      downlink=f"{line['downlink_bytes']:,}",
      train=_milliseconds(line["train_seconds"]),
      send=_milliseconds(line["send_seconds"]),
      server=_milliseconds(line["server_seconds"]),
      keys=keys(line),
    )


def keys(line: Line) -> str:
  """How making and handing out keys grows, or that there are none."""
  made = [k for k in line["keys"] if k["pairs"]]
  if not made:
    return "none"
  return "; ".join(
    f"{k['seconds']:.2g} s, {_megabytes(k['bytes'])} for {k['clients']:,}"
    for k in made
  )


def markdown(lines: Sequence[Line]) -> str:
  """The table in GitHub's dialect, ending in a newline.

  Args:
    lines: of `costs.jsonl`.
  """
  head = list(HEADINGS)
  rule = [":--", *["--:"] * 5, ":--"]
  return tables.joined([head, rule, *rows(lines)])


def sentences(lines: Sequence[Line]) -> Iterator[str]:
  """The cheapest and the dearest, in bytes and in a client's time."""
  small, large = (f(lines, key=lambda x: x["uplink_bytes"]) for f in (min, max))
  yield (
    f"A client sends between {small['uplink_bytes']:,} bytes"
    f" ({small['defense']}) and {large['uplink_bytes']:,} ({large['defense']})."
  )
  quick, slow = (f(lines, key=lambda x: x["send_seconds"]) for f in (min, max))
  least, most = (_milliseconds(x["send_seconds"]) for x in (quick, slow))
  yield (
    f"Protecting and packing takes it from {least} ms ({quick['defense']}) to"
    f" {most} ms ({slow['defense']})."
  )


# Key of a line, colour.
_PARTS = {
  "Client trains": ("train_seconds", "#56b4e9"),
  "Client protects and packs": ("send_seconds", "#d55e00"),
  "Server": ("server_seconds", "#5c6370"),
}


def _draw(lines: Sequence[Line], path: pathlib.Path) -> figures.Figure:
  looks = style.styles([line["defense"] for line in lines])
  places = np.arange(len(lines))
  fig = style.new_figure(8.6, 1.6 + 0.34 * len(lines))
  left, right = fig.subplots(1, 2, sharey=True, width_ratios=(2, 3))
  for ax in (left, right):
    style.clean(ax, "x")
  for place, line in zip(places, lines, strict=True):
    look = looks[line["defense"]]
    left.plot(
      line["uplink_bytes"], place, look.marker, color=look.color, markersize=7
    )
  left.set_xscale("log")
  left.margins(x=0.15)
  left.set_xlabel("Uplink, bytes (log)", fontsize=10, color=style.INK)
  begin = np.zeros(len(lines))
  for label, (key, color) in _PARTS.items():
    value = np.array([1e3 * line[key] for line in lines])
    right.barh(places, value, 0.6, begin, color=color, label=label)
    begin += value
  right.set_xlabel("Milliseconds a client", fontsize=10, color=style.INK)
  left.set_yticks(places, [looks[line["defense"]].label for line in lines])
  left.set_ylim(len(lines) - 0.5, -0.5)
  handles, labels = right.get_legend_handles_labels()
  fig.legend(
    *(handles, labels),
    loc="outside upper right",
    ncols=3,
    frameon=False,
    fontsize=9,
  )
  fig.savefig(path)
  said = "; ".join(
    f"{line['defense']}: {line['uplink_bytes']:,} bytes"
    + "".join(
      f", {label.lower()} {_milliseconds(line[key])} ms"
      for label, (key, _) in _PARTS.items()
    )
    for line in lines
  )
  return figures.Figure(
    path,
    "What each defence costs",
    f"Bytes that a client sends, and bars of milliseconds. {said}.",
    "Of one client of median size, the least of several repetitions, without"
    " compiling.",
    860,
  )


def write(run_dir: str | pathlib.Path) -> pathlib.Path:
  """Draws the figure of a `costs` run and writes its page.

  Args:
    run_dir: the folder of a finished run.

  Returns:
    Path of `report.html`; the figure is in `figures/costs.png` and embedded.

  Raises:
    UserError: the folder holds no finished `costs` run.
  """
  folder, _, config = records.finished(run_dir, "costs")
  lines = records.lines(folder / "costs.jsonl")
  return page.write_table(
    folder,
    config,
    title="What each defence costs",
    sentences=list(sentences(lines)),
    figure=_draw(lines, folder / "figures" / "costs.png"),
    headings=HEADINGS,
    rows=list(rows(lines)),
    references=[],
    note=(
      "Keys: seconds and bytes until that many clients have theirs; pairs of"
      " their own are measured for three and counted for all."
    ),
  )


def _milliseconds(seconds: float) -> str:
  value = 1e3 * seconds
  return tables.fixed(value, 2 if value < 10 else 1 if value < 100 else 0)


def _megabytes(size: int) -> str:
  return f"{size / 1e6:,.3g} MB" if size < 1e9 else f"{size / 1e9:,.3g} GB"
