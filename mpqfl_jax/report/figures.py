"""The figures of a run, drawn on white and saved as PNG."""

from collections.abc import Callable, Iterator
import math
import pathlib
from typing import NamedTuple

from matplotlib import axes as mpl_axes
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
      point = (row["round"] + 1, 100 * row["test_accuracy"])
      lines.setdefault(row["defense"], []).append(point)
  lines = {name: sorted(lines[name]) for name in known if name in lines}
  if not lines:
    return
  height = max(3.6, 0.24 * len(lines) + 1.2)
  fig = style.new_figure(8, height)
  ax = fig.add_subplot()
  style.clean(ax)
  last = max(points[-1][0] for points in lines.values())
  for name, points in lines.items():
    x, y = np.array(points).T
    look = known[name]
    every = max(1, len(points) // 8)
    ax.plot(
      x,
      y,
      color=look.color,
      marker=look.marker,
      markersize=5,
      # Ends on a marker, to which the label belongs.
      markevery=list(range(len(points) - 1, -1, -every)),
      linewidth=1.6,
    )
  ax.set_xlabel("Communication round", fontsize=10, color=style.INK)
  ax.set_ylabel("Test accuracy, %", fontsize=10, color=style.INK)
  ax.set_xlim(0, last + max(1, 0.02 * last))
  ax.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
  low, high = ax.get_ylim()
  high = min(high, 101)
  ax.set_ylim(max(low, -1), high)
  inches = height - 1.0
  gap = 0.17 / inches * (high - low)
  ends = [points[-1][1] for points in lines.values()]
  for name, place in zip(lines, style.spread(ends, gap), strict=True):
    x, y = lines[name][-1]
    ax.annotate(
      f"{known[name].label}  {y:.1f}",
      (x, y),
      xytext=(1.035, place),
      textcoords=ax.get_yaxis_transform(),
      va="center",
      fontsize=9,
      color=style.INK,
      annotation_clip=False,
      arrowprops={
        "arrowstyle": "-",
        "color": known[name].color,
        "linewidth": 0.8,
        "shrinkA": 1,
        "shrinkB": 3,
      },
    )
  path = folder / "accuracy.png"
  fig.savefig(path)
  yield Figure(
    path,
    "Test accuracy over the rounds",
    "Line chart of test accuracy against communication rounds. At the end: "
    + ", ".join(f"{n} {p[-1][1]:.1f} %" for n, p in lines.items())
    + ".",
    "All defences start from the same weights and see the same cohorts.",
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
  fig = style.new_figure(8, 4)
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
      ax.xaxis.set_major_formatter(ticker.FuncFormatter(_bytes))
      ax.xaxis.set_minor_formatter(ticker.NullFormatter())
      ax.set_xlabel("Uplink per client and round (log)", fontsize=10)
    else:
      ax.set_xlabel("PSNR of the strongest attack, dB (median)", fontsize=10)
      low, high = ax.get_xlim()
      ax.set_xlim(min(low, 4), max(high, 26))
  axes[0].set_ylabel("Test accuracy, %", fontsize=10)
  values = [y for points in panels for _, y in points.values()]
  room = 0.2 * max(max(values) - min(values), 1)
  # Room below and above for labels; the references are written at the top.
  axes[0].set_ylim(min(values) - room, max(values) + 1.6 * room)
  notes = _references(axes[-1], run) if privacy else []
  fig.canvas.draw()
  # From here on the layout stands still: labels are placed in pixels.
  fig.set_layout_engine("none")
  for ax, points in zip(axes, panels, strict=True):
    style.label_points(
      ax,
      list(points.values()),
      [style.wrapped(known[name].label) for name in points],
      notes if points is privacy else (),
    )
  path = folder / "tradeoff.png"
  fig.savefig(path)
  said = []
  for name in cost or privacy:
    text = f"{name}: accuracy {(cost or privacy)[name][1]:.1f} %"
    if name in cost:
      text += f", {cost[name][0]:,.0f} bytes"
    if name in privacy:
      text += f", strongest attack {privacy[name][0]:.1f} dB"
    said.append(text)
  caption = "Left: up and to the left is better." if cost else ""
  if privacy:
    caption += (
      " Right: up and to the left is better too; right of the 20 dB line the"
      " private image is there to see."
    )
  yield Figure(
    path,
    "What a defence costs and what it hides",
    "Two scatter plots. " + "; ".join(said) + ".",
    caption.strip(),
    800,
  )


def _distribution(
  run: records.Run, known: dict[str, style.Style], folder: pathlib.Path
) -> Iterator[Figure]:
  panels: dict[tuple[str, str], dict[str, list[float]]] = {}
  for line in run.attacks:
    if line.get("psnr_db") is not None:
      key = (line["attack"], line["knowledge"])
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
  for ax, ((attack, knowledge), panel) in zip(
    grid_axes.flat, panels.items(), strict=False
  ):
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
    ax.set_title(
      f"{attack}, {knowledge}", fontsize=10, loc="left", color=style.INK, pad=16
    )
    ax.set_yticks(
      range(len(names)), [style.wrapped(known[n].label) for n in names]
    )
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_xlim(0, max(26, 1.05 * highest))
    ax.tick_params(axis="y", length=0, labelcolor=style.INK)
    _references(ax, run, above=True)
  for ax in grid_axes[-1]:
    ax.set_xlabel("PSNR, dB", fontsize=10)
  path = folder / "psnr.png"
  fig.savefig(path)
  medians = [
    f"{attack} ({knowledge}) on {name} {np.median(panel[name]):.1f} dB"
    for (attack, knowledge), panel in panels.items()
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
  for group in grid.groups(run.reconstructions):
    name = f"{group[0].attack}_round{group[0].round}"
    same = len(list(folder.glob(f"grid_{name}*.png")))
    del same
    drawn = grid.draw(group, known, grid.settings(run, group))
    path = folder / f"grid_{name}.png"
    drawn.figure.savefig(path)
    yield Figure(path, drawn.title, drawn.alt, drawn.caption, drawn.width)


def _references(
  ax: mpl_axes.Axes, run: records.Run, above: bool = False
) -> list:
  """Lines at the best guess without an attack and at 20 dB, and their text."""
  marks = [(metrics.SUCCESS_DB, f"{metrics.SUCCESS_DB:.0f} dB", style.ALERT)]
  reference = (run.summary.get("references") or {}).get("mean_image") or {}
  if reference.get("psnr_db_median") is not None:
    marks.append((reference["psnr_db_median"], "mean image", style.MUTED))
  notes = []
  for value, text, color in marks:
    ax.axvline(value, color=color, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    notes.append(
      ax.annotate(
        text,
        (value, 1),
        xycoords=ax.get_xaxis_transform(),
        xytext=(0, 2) if above else (3, -2),
        textcoords="offset points",
        ha="center" if above else "left",
        va="bottom" if above else "top",
        fontsize=8,
        color=color,
      )
    )
  return notes


def _widen_log(ax: mpl_axes.Axes, values: list[float]) -> None:
  """At least a decade, and room for labels on both sides."""
  low, high = math.log10(min(values)), math.log10(max(values))
  room = max(0.2 * (high - low), (1 - (high - low)) / 2, 0.15)
  ax.set_xlim(10 ** (low - room), 10 ** (high + room))


def _bytes(value: float, _: int) -> str:
  for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
    if value >= size:
      return f"{value / size:g} {unit}"
  return f"{value:g} B"
