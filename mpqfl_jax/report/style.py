"""Colours, markers and the placing of labels, shared by all figures.

The colours are Okabe and Ito's ("Color universal design", 2008) without the
yellow, which is too pale for a line on white; each also has a marker, so that
no figure depends on colour alone.
"""

from collections.abc import Iterable, Sequence
import itertools
import math
import pathlib
from typing import Literal, NamedTuple

from matplotlib import axes as mpl_axes
from matplotlib import (
  colors,
  font_manager,
  layout_engine,
  patheffects,
  textpath,
  ticker,
)
from matplotlib import figure as mpl_figure
from matplotlib import lines as mpl_lines
from matplotlib import text as mpl_text
from matplotlib import transforms as mpl_transforms
from matplotlib.backends import backend_agg
import numpy as np

INK = "#1c1e21"
MUTED = "#5c6370"
RULE = "#d9dce1"
ALERT = "#b3261e"
DPI = 200
# Numbers on an axis.
plain = ticker.FuncFormatter(
  lambda v, _: f"{v:,g}" if v < 1e6 else f"{v / 1e6:,.0f} M"
)

_COLORS = (
  "#1c1e21",
  "#0072b2",
  "#009e73",
  "#d55e00",
  "#b8579a",
  "#c98500",
  "#3fa3de",
  "#7d5ba6",
  "#7a5230",
)
_MARKERS = ("o", "s", "D", "v", "P", "^", "X", "p", "<", "h", ">")
# The slots that these names take wherever they occur; others fill the gaps.
_SLOTS = {
  "none": 0,
  "paper": 1,
  "mixed_random": 2,
  "int2": 3,
  "prune": 4,
  "dp_gaussian": 5,
  "int4": 6,
  "int8": 7,
  "he": 8,
}


class Style(NamedTuple):
  """How one defence is drawn in every figure.

  Attributes:
    label: its name, without parameters where those are not needed to tell it
      from the run's other defences.
    color: hexadecimal.
    marker: Matplotlib's.
  """

  label: str
  color: str
  marker: str


def styles(defenses: Iterable[str]) -> dict[str, Style]:
  """One style for each defence of a run.

  Args:
    defenses: names, with or without parameters.
  """
  names = list(defenses)
  families = [family(name) for name in names]
  slots: dict[str, int] = {}
  for name, base in zip(names, families, strict=True):
    slot = _SLOTS.get(base)
    if slot is not None and slot not in slots.values():
      slots[name] = slot
  free = (k for k in itertools.count() if k not in slots.values())
  for name in names:
    if name not in slots:
      slots[name] = next(free)
  labels = _short(names)
  return {
    name: Style(
      label=labels[name],
      color=_color(slots[name]),
      marker=_MARKERS[slots[name] % len(_MARKERS)],
    )
    for name in names
  }


def _darker(color: str) -> str:
  """Enough for small text on white."""
  red, green, blue = colors.to_rgb(color)
  return colors.to_hex((0.72 * red, 0.72 * green, 0.72 * blue))


def _color(slot: int) -> str:
  # Black stays with the first: no defence must look like having none.
  if slot < len(_COLORS):
    return _COLORS[slot]
  return _COLORS[1 + (slot - 1) % (len(_COLORS) - 1)]


def _short(names: Sequence[str]) -> dict[str, str]:
  """Leaves out what is not needed to tell a run's defences apart."""
  out = {}
  for name in names:
    base = family(name)
    kin = [_parameters(n) for n in names if family(n) == base]
    if base.endswith(".toml"):
      base = pathlib.PurePath(base).stem
    own = _parameters(name)
    differ = [k for k in own if any(other.get(k) != own[k] for other in kin)]
    if len(differ) == 1 and own[differ[0]] in ("true", "True"):
      out[name] = f"{base} {differ[0]}"
    elif len(differ) == 1:
      out[name] = f"{base} {own[differ[0]]}"
    else:
      out[name] = " ".join([base, *(f"{k}={own[k]}" for k in differ)])
  return out if len(set(out.values())) == len(names) else {n: n for n in names}


def _parameters(defense: str) -> dict[str, str]:
  inside = defense.partition("(")[2].removesuffix(")")
  pairs = (part.partition("=") for part in inside.split(",") if part.strip())
  return {key.strip(): value.strip() for key, _, value in pairs}


def family(defense: str) -> str:
  """The name without its parameters."""
  return defense.split("(")[0]


def wrapped(label: str) -> str:
  """A long name with its parameters on lines of their own."""
  if len(label) <= 16:
    return label
  return label.replace("(", "\n(", 1).replace(",", ",\n").replace(" ", "\n")


def new_figure(width: float, height: float) -> mpl_figure.Figure:
  """A figure with an Agg canvas of its own, sizes in inches."""
  fig = mpl_figure.Figure(
    figsize=(width, height),
    dpi=DPI,
    facecolor="white",
    layout=layout_engine.ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1),
  )
  backend_agg.FigureCanvasAgg(fig)
  return fig


def clean(ax: mpl_axes.Axes, grid: Literal["both", "x", "y"] = "both") -> None:
  """Takes away the frame, leaves a light grid, sets readable ticks."""
  ax.spines[["top", "right"]].set_visible(False)
  ax.spines[["left", "bottom"]].set_color(RULE)
  ax.tick_params(which="both", labelsize=9, color=RULE, labelcolor=MUTED)
  ax.grid(True, axis=grid, color=RULE, linewidth=0.6)
  ax.set_axisbelow(True)


def spread(positions: Sequence[float], gap: float) -> list[float]:
  """Moves positions apart as little as needed, keeping their order.

  Args:
    positions: along one axis, in any order.
    gap: the smallest distance allowed.

  Returns:
    New positions: the least-squares solution (pooling of adjacent violators).
  """
  order = np.argsort(positions, kind="stable")
  # With the gaps taken out, "apart" becomes "not decreasing".
  flat = np.asarray(positions, float)[order] - gap * np.arange(len(order))
  blocks: list[tuple[float, int]] = []
  for value in flat:
    blocks.append((value, 1))
    while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
      (b, m), (a, n) = blocks.pop(), blocks.pop()
      blocks.append(((a * n + b * m) / (n + m), n + m))
  out = np.empty(len(order))
  pooled = np.repeat([v for v, _ in blocks], [n for _, n in blocks])
  out[order] = pooled + gap * np.arange(len(order))
  return list(out)


def text_width(text: str, size: float) -> int:
  """Pixels, at `DPI`, that a line of text is wide, rounded up.

  Args:
    text: one line.
    size: of its letters, in points.
  """
  font = font_manager.FontProperties(size=size)
  width, _, _ = textpath.text_to_path.get_text_width_height_descent(
    text, font, ismath=False
  )
  return math.ceil(width * DPI / 72)


def rules(
  ax: mpl_axes.Axes,
  marks: Iterable[tuple[float, str, str]],
  above: bool = True,
) -> tuple[list[mpl_lines.Line2D], list[mpl_text.Text]]:
  """Dashed lines across a plot of dB, and their names at the top.

  Of several the lowest is named on the left of its line, the others on the
  right.

  Args:
    ax: the plot.
    marks: (place on the x axis, name, colour).
    above: whether names stand above the plot; else inside.
  """
  lines: list[mpl_lines.Line2D] = []
  notes: list[mpl_text.Text] = []
  ordered = sorted(marks)
  for i, (value, text, color) in enumerate(ordered):
    left = i == 0 and len(ordered) > 1
    lines.append(
      ax.axvline(value, color=color, lw=1, linestyle=(0, (4, 3)), zorder=1)
    )
    notes.append(
      ax.annotate(
        text,
        (value, 1),
        xycoords=ax.get_xaxis_transform(),
        xytext=(-3 if left else 3, 2 if above else -2),
        textcoords="offset points",
        ha="right" if left else "left",
        va="bottom" if above else "top",
        fontsize=8,
        color=color,
      )
    )
  return lines, notes


def label_points(
  ax: mpl_axes.Axes,
  points: Sequence[tuple[float, float]],
  looks: Sequence[Style],
  obstacles: Sequence[mpl_text.Text] = (),
  rules: Sequence[mpl_lines.Line2D] = (),
) -> None:
  """Writes each point's label beside it, where nothing else is.

  Args:
    ax: with its final limits and size.
    points: data coordinates.
    looks: one a point; the label has its colour, darkened.
    obstacles: text that is already there.
    rules: lines across the plot.
  """
  renderer = ax.figure.canvas.get_renderer()  # type: ignore[attr-defined]
  scale = ax.figure.dpi / 72
  frame = ax.get_window_extent(renderer)
  pixels = ax.transData.transform(np.asarray(points))
  taken = [t.get_window_extent(renderer).padded(4) for t in obstacles]
  taken += [line.get_window_extent(renderer).padded(3) for line in rules]
  taken += [
    mpl_transforms.Bbox.from_bounds(x, y, 0, 0).padded(5 * scale)
    for x, y in pixels
  ]
  for point, look in zip(points, looks, strict=True):
    best: tuple[float, mpl_text.Annotation] | None = None
    for radius, (dx, dy) in itertools.product(
      (9, 16, 26, 38, 52),
      ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1)),
    ):
      long = radius > 9
      note = ax.annotate(
        wrapped(look.label),
        point,
        xytext=(radius * dx, radius * dy * 0.9),
        textcoords="offset points",
        ha=("center", "left", "right")[dx],
        va=("center", "bottom", "top")[dy],
        fontsize=9,
        color=_darker(look.color),
        path_effects=[patheffects.withStroke(linewidth=2.5, foreground="w")],
        arrowprops={
          "arrowstyle": "-",
          "color": look.color,
          "linewidth": 0.8,
          "shrinkA": 0,
          "shrinkB": 3,
          "relpos": ((1 - dx) / 2, (1 - dy) / 2),
        }
        if long
        else None,
      )
      note.update_positions(renderer)
      # The leader line is not part of the text's own box.
      box = mpl_text.Text.get_window_extent(note, renderer)
      cost = sum(_overlap(box, other) for other in taken)
      cost += box.width * box.height - _overlap(box, frame)
      cost += radius * scale
      if long:
        cost += _crossings(ax.transData.transform(point), box, taken)
      if best is None or cost < best[0]:
        if best is not None:
          best[1].remove()
        best = (cost, note)
      else:
        note.remove()
      if best[0] <= radius * scale:
        break  # Nothing is in its way, and no later place is nearer.
    assert best is not None
    taken.append(mpl_text.Text.get_window_extent(best[1], renderer).padded(2))


def _crossings(
  start: np.ndarray,
  box: mpl_transforms.Bbox,
  taken: Sequence[mpl_transforms.Bbox],
) -> float:
  """A price for each step of a leader line that runs over something."""
  end = np.clip(start, box.min, box.max)
  steps = [start + t * (end - start) for t in (0.3, 0.5, 0.7, 0.9)]
  return 300.0 * sum(b.contains(*p) for b in taken for p in steps)


def _overlap(a: mpl_transforms.Bbox, b: mpl_transforms.Bbox) -> float:
  both = mpl_transforms.Bbox.intersection(a, b)
  return 0.0 if both is None else both.width * both.height
