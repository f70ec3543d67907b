"""Rate against distortion: what each codec makes of one update."""

from collections.abc import Iterable
from typing import NamedTuple

import jax
from matplotlib import figure as mpl_figure
import numpy as np

from mpqfl_jax import precision, specs, trees
from mpqfl_jax.report import style
from mpqfl_jax.types import Key, Update

# Curves of the figure: a label, and codecs from few bits to many.
CURVES: dict[str, tuple[str, ...]] = {
  "int, nearest": tuple(f"int{b}" for b in (2, 3, 4, 5, 6, 7, 8)),
  "int, per channel": tuple(
    f"int{b}(granularity=channel)" for b in (2, 3, 4, 5, 6, 7, 8)
  ),
  "int, stochastic": tuple(
    f"int{b}(rounding=stochastic)" for b in (2, 3, 4, 5, 6, 7, 8)
  ),
  "largest entries": tuple(f"topk(ratio={r})" for r in (0.01, 0.03, 0.1, 0.3)),
  "float": ("float8", "bfloat16", "float16"),
  "sign": ("sign",),
  "ternary": ("ternary",),
  "nf4": ("nf4",),
  "drive": ("drive",),
  "paper": ("paper",),
}


class Point(NamedTuple):
  """One codec's rate and distortion on one update.

  Attributes:
    codec: as a flag would name it.
    bits: of the packed message, header included, an entry of the update.
    snr_db: energy of the update over energy of the error, in dB.
  """

  codec: str
  bits: float
  snr_db: float


def measure(update: Update, codecs: Iterable[str], key: Key) -> list[Point]:
  """Encodes, packs, unpacks and decodes an update with each codec.

  Args:
    update: what a client wants to send.
    codecs: `name` or `name(key=value,...)`.
    key: for rounding and random choices.

  Raises:
    UserError: no such codec, or options that it does not take.
  """
  points = []
  energy = float(trees.squared_norm(update))
  for spec in codecs:
    name, options = specs.parse(spec)
    codec = precision.make(name, update, **options)
    payload, _ = jax.jit(codec.encode)(key, update, codec.init(update))
    message = codec.pack(jax.device_get(payload))
    decoded = codec.decode(codec.unpack(message))
    error = float(trees.squared_norm(trees.subtract(update, decoded)))
    snr = 10 * np.log10(energy / error) if error else np.inf
    points.append(Point(spec, 8 * len(message) / trees.size(update), snr))
  return points


def draw(curves: dict[str, list[Point]]) -> mpl_figure.Figure:
  """Draws signal-to-noise ratio against bits an entry, a line a curve.

  Args:
    curves: label -> points, as `measure` gives them for `CURVES`.
  """
  fig = style.new_figure(8.0, 5.0)
  ax = fig.add_subplot()
  looks = style.styles(curves)
  for label, points in curves.items():
    look = looks[label]
    ordered = sorted(points, key=lambda p: p.bits)
    ax.plot(
      [p.bits for p in ordered],
      [p.snr_db for p in ordered],
      color=look.color,
      marker=look.marker,
      markersize=6,
      linewidth=1.4,
      label=label,
    )
  ax.axhline(0, color=style.MUTED, linewidth=0.8, linestyle="--")
  ax.set_xscale("log", base=2)
  ax.set_xticks([0.25, 0.5, 1, 2, 4, 8, 16])
  ax.set_xticklabels(["1/4", "1/2", "1", "2", "4", "8", "16"])
  ax.set_xlabel("Bits an entry on the wire (log)", color=style.INK)
  ax.set_ylabel("Signal to noise, dB", color=style.INK)
  style.clean(ax)
  fig.legend(loc="outside right upper", frameon=False, fontsize=8.5)
  return fig
