"""The page and the figure of a `scaling` run: cost against clients."""

from collections.abc import Callable, Iterator, Sequence
import pathlib
from typing import Any, NamedTuple

import numpy as np

from mpqfl_jax.report import (
  figures,
  key_growth,
  page,
  records,
  style,
  tables,
)


class Panel(NamedTuple):
  """One quantity of the figure and of the table.

  Attributes:
    key: in a line of `scaling.jsonl`.
    heading: with its unit.
    text: value -> as the table has it.
    grows: whether it must grow with the clients; else it had better be flat.
  """

  key: str
  heading: str
  text: Callable[[float], str]
  grows: bool


def _significant(value: float) -> str:
  digits = max(0, 2 - int(np.floor(np.log10(value)))) if value > 0 else 0
  return f"{value:,.{digits}f}"


PANELS = (
  Panel("seconds_per_round", "Seconds a round", _significant, True),
  Panel(
    "client_updates_per_second", "Client updates a second", _significant, False
  ),
  Panel("uplink_bytes", "Uplink, bytes a round", lambda v: f"{v:,.0f}", True),
  Panel("peak_rss_mb", "Peak memory, MB", lambda v: f"{v:,.0f}", False),
  Panel(
    "test_accuracy", "Test accuracy, share", lambda v: f"{100 * v:.1f}%", False
  ),
)
_HEADINGS = ("Defense", "Clients a round", *(p.heading for p in PANELS))


def markdown(lines: list[dict[str, Any]]) -> str:
  """The table in GitHub's dialect, ending in a newline.

  Args:
    lines: of `scaling.jsonl`.
  """
  rule = [":--", *["--:"] * (len(_HEADINGS) - 1)]
  return tables.joined([_HEADINGS, rule, *_rows(lines)])


def _rows(lines: list[dict[str, Any]]) -> Iterator[list[str]]:
  for line in lines:
    yield [
      line["defense"],
      f"{line['clients']:,}",
      *(p.text(line[p.key]) for p in PANELS),
    ]


def sentences(lines: list[dict[str, Any]]) -> Iterator[str]:
  """What the fewest clients a round cost against the most, by defence."""
  for defense in dict.fromkeys(line["defense"] for line in lines):
    mine = sorted(
      (line for line in lines if line["defense"] == defense),
      key=lambda line: line["clients"],
    )
    few, many = mine[0], mine[-1]
    if few is many:
      continue
    cost = few["client_updates_per_second"] / many["client_updates_per_second"]
    memory = many["peak_rss_mb"] / few["peak_rss_mb"]
    yield (
      f"{defense}: from {few['clients']:,} to {many['clients']:,} clients a"
      f" round, a client takes {cost:.2f} times the time and the process"
      f" {memory:.2f} times the memory."
    )


def write(run_dir: str | pathlib.Path) -> pathlib.Path:
  """Draws the figure of a `scaling` run and writes its page.

  Args:
    run_dir: the folder of a finished run.

  Returns:
    Path of `report.html`; the figure is in `figures/scaling.png` and embedded.

  Raises:
    UserError: the folder holds no finished `scaling` run.
  """
  folder, summary, config = records.finished(run_dir, "scaling")
  lines = summary["scaling"]
  path = folder / "figures" / "scaling.png"
  draw(lines, summary.get("encryption")).savefig(path)
  plan, devices = lines[0]["plan"], lines[0]["devices"]
  side = f", {plan['size']} clients side by side" if plan["size"] > 1 else ""
  host = config["host"]
  return page.write_table(
    folder,
    config,
    title="Cost against clients",
    sentences=list(sentences(lines)),
    figure=figures.Figure(
      path,
      "Cost against clients",
      "Panels over the clients of a round: seconds, client updates a second,"
      " uplink bytes, peak memory, test accuracy, and seconds for making keys"
      " where costs of encryption were given. The table below has the numbers.",
      "Median of the rounds after the first, tests left out; compiling is not"
      " in it. Every point is a process of its own.",
      860,
    ),
    headings=_HEADINGS,
    rows=list(_rows(lines)),
    references=[],
    note=(
      f"Plan {plan['name']}{side} ({plan['reason']}), on {devices}"
      f" {host['backend']} device{'' if devices == 1 else 's'}, {host['cores']}"
      " cores."
    ),
  )


def draw(
  lines: list[dict[str, Any]],
  encryption: Sequence[dict[str, Any]] | None = None,
):
  """A panel for each quantity, over the clients of a round.

  What should be flat has an axis from zero, which does not blow up its noise.

  Args:
    lines: of `scaling.jsonl`.
    encryption: rows of `python -m benchmarks.encryption`, for a panel of keys.

  Returns:
    The figure.
  """
  fig = style.new_figure(8.6, 9.0)
  looks = style.styles(dict.fromkeys(line["defense"] for line in lines))
  places = list(fig.subplots(3, 2).flat)
  if encryption:
    key_growth.draw_keys(places[-1], encryption)
  else:
    places[-1].set_axis_off()
  for ax, panel in zip(places, PANELS, strict=False):
    style.clean(ax)
    for defense, look in looks.items():
      mine = [line for line in lines if line["defense"] == defense]
      ax.plot(
        [line["clients"] for line in mine],
        [line[panel.key] for line in mine],
        color=look.color,
        marker=look.marker,
        markersize=6,
        linewidth=1.5,
        label=look.label,
      )
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(style.plain)
    if panel.grows:
      ax.set_yscale("log")
      ax.yaxis.set_major_formatter(style.plain)
    else:
      ax.set_ylim(0, 1.15 * max(line[panel.key] for line in lines))
    ax.set_title(panel.heading, fontsize=10, loc="left", color=style.INK)
    ax.set_xlabel("Clients a round (log)", fontsize=9, color=style.INK)
  if len(looks) > 1:
    handles, labels = places[0].get_legend_handles_labels()
    fig.legend(
      handles, labels, loc="outside upper right", ncols=4, frameon=False
    )
  return fig
