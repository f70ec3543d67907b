"""The figures of a run, drawn on white and saved as PNG."""

from collections.abc import Callable, Iterator, Sequence
import math
import pathlib
import re
from typing import Any, NamedTuple

from matplotlib import axes as mpl_axes
from matplotlib import lines as mpl_lines
from matplotlib import text as mpl_text
from matplotlib import ticker
import numpy as np

from mpqfl_jax import metrics
from mpqfl_jax.report import grid, records, style


class Figure(NamedTuple):
  """A figure on disk.

  Attributes:
    path: the PNG.
    title: a heading for it.
    alt: what a reader who cannot see it should know.
    caption: how to read it.
    width: the width in CSS pixels at which it is sharp and legible.
  """

  path: pathlib.Path
  title: str
  alt: str
  caption: str
  width: int


# Accuracy axes span this many points at least.
_LEAST_POINTS = 4


def write(run: records.Run) -> dict[str, list[Figure]]:
  """Draws every figure that the run has data for.

  Args:
    run: a run's folder in memory.

  Returns:
    Figures by section: `tradeoff`, `grids`, `distribution`, `accuracy`; a
    section is empty where its data are.
  """
  folder = run.folder / "figures"
  folder.mkdir(exist_ok=True)
  # Their numbers change when a resumed run has attacked more.
  for old in folder.glob("grid_*.png"):
    old.unlink()
  known = style.styles(run.summary["defenses"])
  sections: dict[str, Callable] = {
    "tradeoff": _tradeoff,
    "grids": _grids,
    "distribution": _distribution,
    "accuracy": _accuracy,
  }
  return {
    name: list(draw(run, known, folder)) for name, draw in sections.items()
  }


def _accuracy(
  run: records.Run, known: dict[str, style.Style], folder: pathlib.Path
) -> Iterator[Figure]:
  lines: dict[str, list[tuple[int, float]]] = {}
  for row in run.rounds:
    if row.get("test_accuracy") is not None:
      point = (row["round"], 100 * row["test_accuracy"])
      lines.setdefault(row["defense"], []).append(point)
  lines = {name: sorted(lines[name]) for name in known if name in lines}
  if lines:
    yield draw_accuracy(
      lines,
      known,
      folder / "accuracy.png",
      "Test accuracy over the rounds",
      "All defences start from the same weights and see the same cohorts.",
    )


def draw_accuracy(
  lines: dict[str, list[tuple[int, float]]],
  known: dict[str, style.Style],
  path: pathlib.Path,
  title: str,
  caption: str,
) -> Figure:
  """Draws accuracy over the rounds.

  Args:
    lines: defence -> (round, test accuracy in percent), by round; one or more.
    known: how each is drawn.
    path: of the PNG.
    title, caption: of the figure.
  """
  height = max(3.6, 0.24 * len(lines) + 1.2)
  fig = style.new_figure(8, height)
  last = max(points[-1][0] for points in lines.values())
  # The defences part late and by little, so the second half gets a panel.
  starts = [0, last // 2] if last >= 8 else [0]
  axes = fig.subplots(
    1, len(starts), squeeze=False, width_ratios=[1, 1.15][: len(starts)]
  )[0]
  for ax, start in zip(axes, starts, strict=True):
    style.clean(ax)
    for k, (name, points) in enumerate(lines.items()):
      kept = [p for p in points if p[0] >= start] or points[-1:]
      x, y = np.array(kept).T
      every = max(1, len(kept) // 5)
      ax.plot(
        x,
        y,
        color=known[name].color,
        marker=known[name].marker,
        markersize=5.5,
        markeredgecolor="white",
        markeredgewidth=0.6,
        # Offset from line to line, so that no marker hides another.
        markevery=(k % every, every),
        linewidth=1.6,
      )
    ax.set_xlabel("Communication round", fontsize=10, color=style.INK)
    ax.set_xlim(start, last + 0.01 * (last - start))
    ax.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
  axes[0].set_ylabel("Test accuracy, %", fontsize=10, color=style.INK)
  if len(axes) > 1:
    axes[1].set_title(
      f"from round {starts[1]}", fontsize=9, loc="left", color=style.MUTED
    )
  ax = axes[-1]
  low, high = ax.get_ylim()
  gap = 0.19 / (height - 1.0) * (high - low)
  ends = [points[-1][1] for points in lines.values()]
  for name, place in zip(lines, style.spread(ends, gap), strict=True):
    x, y = lines[name][-1]
    color, beside = known[name].color, ax.get_yaxis_transform()
    ax.annotate(
      "",
      (x, y),
      xytext=(1.07, place),
      textcoords=beside,
      annotation_clip=False,
      arrowprops={
        "arrowstyle": "-",
        "color": color,
        "linewidth": 1.2,
        "shrinkA": 0,
        "shrinkB": 0,
      },
    )
    ax.plot(
      [1.07],
      [place],
      known[name].marker,
      color=color,
      markersize=5.5,
      transform=beside,
      clip_on=False,
    )
    ax.annotate(
      f"{known[name].label}  {y:.1f}",
      (1.07, place),
      xycoords=beside,
      xytext=(7, 0),
      textcoords="offset points",
      va="center",
      fontsize=9,
      color=style.INK,
      annotation_clip=False,
    )
  # Placing the labels must not move the axis.
  ax.set_ylim(low, high)
  fig.savefig(path)
  return Figure(
    path,
    title,
    "Line chart of test accuracy against communication rounds. At the end: "
    + ", ".join(f"{n} {p[-1][1]:.1f}%" for n, p in lines.items())
    + ".",
    caption,
    800,
  )


def _tradeoff(
  run: records.Run, known: dict[str, style.Style], folder: pathlib.Path
) -> Iterator[Figure]:
  cost: dict[str, tuple[float, float]] = {}
  privacy: dict[str, tuple[float, float]] = {}
  for name, entry in run.summary["defenses"].items():
    accuracy = entry.get("test_accuracy")
    if accuracy is None:
      continue
    if entry.get("uplink_bytes_per_client"):
      cost[name] = (entry["uplink_bytes_per_client"], 100 * accuracy)
    top = records.strongest(entry)
    if top is not None and top.psnr_db_median is not None:
      privacy[name] = (top.psnr_db_median, 100 * accuracy)
  panels = [p for p in (cost, privacy) if p]
  if not panels:
    return
  fig = style.new_figure(8, 4 if len(run.summary["defenses"]) <= 8 else 5)
  axes = fig.subplots(1, len(panels), sharey=True, squeeze=False)[0]
  for ax, points in zip(axes, panels, strict=True):
    style.clean(ax)
    for name, (x, y) in points.items():
      look = known[name]
      ax.plot(x, y, look.marker, color=look.color, markersize=7.5)
    ax.margins(0.16)
    if points is cost:
      ax.set_xscale("log")
      _widen_log(ax, [x for x, _ in points.values()])
      ax.xaxis.set_major_locator(ticker.LogLocator(subs=_ticks(points)))
      ax.xaxis.set_major_formatter(ticker.FuncFormatter(_bytes))
      ax.xaxis.set_minor_locator(ticker.NullLocator())
      ax.set_xlabel("Uplink per client and round (log)", fontsize=10)
    else:
      ax.set_xlabel("PSNR of the strongest attack, dB (median)", fontsize=10)
      ax.set_xlim(0, max(ax.get_xlim()[1], 26))
  axes[0].set_ylabel("Test accuracy, %", fontsize=10)
  values = [y for points in panels for _, y in points.values()]
  # Differences of a fraction of a point must not fill the panel.
  missing = max(0, _LEAST_POINTS - (max(values) - min(values))) / 2
  low, high = min(values) - missing, max(values) + missing
  room = 0.2 * (high - low)
  # Room below and above for labels; the references are written at the top.
  axes[0].set_ylim(low - room, high + 1.6 * room)
  rules, notes = references(axes[-1], run.summary) if privacy else ([], [])
  fig.canvas.draw()
  # From here on the layout stands still: labels are placed in pixels.
  fig.set_layout_engine("none")
  for ax, points in zip(axes, panels, strict=True):
    style.label_points(
      ax,
      list(points.values()),
      [known[name] for name in points],
      notes if points is privacy else (),
      rules if points is privacy else (),
    )
  path = folder / "tradeoff.png"
  fig.savefig(path)
  said = []
  for name in cost or privacy:
    text = f"{name}: accuracy {(cost or privacy)[name][1]:.1f}%"
    if name in cost:
      text += f", {cost[name][0]:,.0f} bytes"
    if name in privacy:
      text += f", strongest attack {privacy[name][0]:.1f} dB"
    said.append(text)
  caption = "Up and to the left is better."
  if privacy:
    caption += (
      f" Right of the {metrics.SUCCESS_DB:.0f} dB line the private image is"
      " there to see."
    )
  plots = "Two scatter plots" if len(panels) > 1 else "Scatter plot"
  yield Figure(
    path,
    "What a defence costs and what it hides",
    f"{plots}. " + "; ".join(said) + ".",
    caption,
    800,
  )


def strips(
  ax: mpl_axes.Axes,
  names: Sequence[str],
  panel: dict[str, list[float]],
  known: dict[str, style.Style],
  highest: float,
) -> None:
  """A row a defence: a mark for each value in dB, a bar at their median.

  Args:
    ax: the plot.
    names: of the rows, from the top.
    panel: the values; a name without any was not attacked.
    known: the style of each name.
    highest: of the values of all plots that share the axis.
  """
  style.clean(ax, grid="x")
  for row, name in enumerate(names):
    values = np.sort(panel.get(name, []))
    if not values.size:
      ax.text(
        1, row, "not attacked", fontsize=8, va="center", color=style.MUTED
      )
      continue
    look = known[name]
    jitter = 0.13 * np.array([-1, 1, 0])[np.arange(len(values)) % 3]
    ax.plot(
      values,
      row + jitter,
      look.marker,
      color=look.color,
      alpha=0.65,
      markersize=5,
      markeredgewidth=0,
    )
    middle = np.median(values)
    ax.plot([middle] * 2, [row - 0.34, row + 0.34], color=style.INK, lw=2)
  ax.set_yticks(
    range(len(names)), [style.wrapped(known[n].label) for n in names]
  )
  ax.set_ylim(len(names) - 0.5, -0.5)
  ax.set_xlim(0, max(26, 1.05 * highest))
  ax.tick_params(axis="y", length=0, labelcolor=style.INK)


def _distribution(
  run: records.Run, known: dict[str, style.Style], folder: pathlib.Path
) -> Iterator[Figure]:
  panels: dict[str, dict[str, list[float]]] = {}
  several = len({line["round"] for line in run.attacks}) > 1
  for line in run.attacks:
    if line.get("psnr_db") is not None:
      key = f"{line['attack']}, {line['knowledge']}"
      # Weights that were trained for long give less away: no median of both.
      key += f", round {line['round']}" * several
      panel = panels.setdefault(key, {})
      panel.setdefault(line["defense"], []).append(line["psnr_db"])
  if not panels:
    return
  names = [n for n in known if any(n in panel for panel in panels.values())]
  columns = min(2, len(panels))
  rows = math.ceil(len(panels) / columns)
  fig = style.new_figure(8, rows * (0.36 * len(names) + 1.15))
  grid_axes = fig.subplots(
    rows, columns, sharex=True, sharey=True, squeeze=False
  )
  highest = max(max(v) for p in panels.values() for v in p.values())
  for ax in grid_axes.flat[len(panels) :]:
    ax.set_visible(False)
  for ax, (title, panel) in zip(grid_axes.flat, panels.items(), strict=False):
    strips(ax, names, panel, known, highest)
    ax.set_title(title, fontsize=10, loc="left", color=style.INK, pad=16)
    references(ax, run.summary, above=True)
  for ax in grid_axes[-1]:
    ax.set_xlabel("PSNR, dB", fontsize=10)
  path = folder / "psnr.png"
  fig.savefig(path)
  medians = [
    f"{title} on {name} {np.median(panel[name]):.1f} dB"
    for title, panel in panels.items()
    for name in names
    if name in panel
  ]
  yield Figure(
    path,
    "Every reconstruction",
    "Strip chart of the PSNR of each reconstruction. Medians: "
    + ", ".join(medians)
    + ".",
    "One mark a private image, the bar at the median.",
    800,
  )


def _grids(
  run: records.Run, known: dict[str, style.Style], folder: pathlib.Path
) -> Iterator[Figure]:
  for number, group in enumerate(grid.groups(run.reconstructions), 1):
    attack = re.sub(r"[^a-z0-9]+", "_", group[0].attack.lower()).strip("_")
    path = folder / f"grid_{number}_{attack}_round{group[0].round}.png"
    drawn = grid.draw(group, known, grid.settings(run, group))
    drawn.figure.savefig(path)
    yield Figure(path, drawn.title, drawn.alt, drawn.caption, drawn.width)


def references(
  ax: mpl_axes.Axes, summary: dict[str, Any], above: bool = False
) -> tuple[list[mpl_lines.Line2D], list[mpl_text.Text]]:
  """Lines at the best guess without an attack and at 20 dB, and their text."""
  marks = [(metrics.SUCCESS_DB, f"{metrics.SUCCESS_DB:.0f} dB", style.ALERT)]
  reference = (summary.get("references") or {}).get("mean_image") or {}
  if reference.get("psnr_db_median") is not None:
    marks.append((reference["psnr_db_median"], "mean image", style.MUTED))
  return style.rules(ax, marks, above)


def _widen_log(ax: mpl_axes.Axes, values: list[float]) -> None:
  """At least a decade, and room for labels on both sides."""
  low, high = math.log10(min(values)), math.log10(max(values))
  room = max(0.2 * (high - low), (1 - (high - low)) / 2, 0.15)
  ax.set_xlim(10 ** (low - room), 10 ** (high + room))


def _ticks(points: dict[str, tuple[float, float]]) -> tuple[float, ...]:
  """Which multiples of powers of ten to label: fewer over many decades."""
  sizes = [x for x, _ in points.values()]
  return (1, 2, 5) if max(sizes) < 60 * min(sizes) else (1,)


def _bytes(value: float, _: int) -> str:
  for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
    if value >= size:
      return f"{value / size:g} {unit}"
  return f"{value:g} B"
