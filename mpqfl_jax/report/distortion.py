"""Rate against distortion: what each codec makes of one update."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
from matplotlib import figure as mpl_figure
import numpy as np

from mpqfl_jax import precision, specs, trees
from mpqfl_jax.report import style
from mpqfl_jax.types import Key, Update

# The curve that every panel shows, for comparison.
REFERENCE = "symmetric"
_WIDTHS = (2, 3, 4, 5, 6, 8)
_SHARES = (0.003, 0.01, 0.03, 0.1, 0.2)


def panels(entries: int) -> dict[str, dict[str, list[str]]]:
  """What the figure compares: every codec, family by family.

  Args:
    entries: of the update, from which byte budgets follow.

  Returns:
    Title of a panel -> label of a curve -> its codecs.
  """

  def each(spec: str, values: Iterable[object] = _WIDTHS) -> list[str]:
    return [spec.format(value) for value in values]

  bytes_ = [round(entries * bits / 8) for bits in (0.5, 1, 2, 3, 4, 6, 8)]
  coarse = (0.5, 0.2, 0.1, 0.03, 0.01, 0.001)
  return {
    "Integers, nearest": {
      REFERENCE: each("int{}", (*_WIDTHS, 16)),
      "affine": each("int{}(mode=affine)", (1, *_WIDTHS, 16)),
      "scale a power of two": each("int{}(power_of_two=true)"),
      "a scale a channel": each("int{}(granularity=channel)"),
      "a scale every 64": each("int{}(granularity=64)"),
      "rotated": each("int{}(rotate=true)", _WIDTHS[:-1]),
    },
    "Integers, at random": {
      "stochastic": each("int{}(rounding=stochastic)"),
      "dither": each("int{}(rounding=dither)"),
      "stochastic, a channel": each(
        "int{}(rounding=stochastic,granularity=channel)"
      ),
      "stochastic, rotated": each(
        "int{}(rounding=stochastic,rotate=true)", _WIDTHS[:-1]
      ),
      "QSGD, max norm": each("qsgd(levels={},norm=max)", (1, 3, 7, 15, 31)),
      "QSGD, L2 norm": each("qsgd(levels={})", (7, 15, 31, 63, 127)),
    },
    "Floats, signs, tables": {
      "float16": ["float16"],
      "bfloat16": ["bfloat16"],
      "float8, e5m2 and e4m3": each("float8(format={})", ("e5m2", "e4m3")),
      "NF4, a scale every 1,024 to 16": each(
        "nf4(granularity={})", (1024, 256, 64, 16)
      ),
      "ternary": each("ternary(granularity={})", ("tensor", "channel")),
      "sign": each("sign(granularity={})", ("tensor", "channel", 64, 16)),
      "DRIVE": ["drive(unbiased=false)"],
      "DRIVE, unbiased": ["drive"],
    },
    "A share of the entries": {
      "the largest (top-k)": each("topk(ratio={})", _SHARES),
      "the largest (prune)": each("prune(ratio={})", (0.995, 0.95, 0.85)),
      "at random (random-k)": each("randomk(ratio={})", (0.1, 0.2, 0.25)),
    },
    "Policies": {
      "paper": ["paper"],
      "mixed_random": ["mixed_random"],
      "mixed_random, 2, 4 or 6 bits": ["mixed_random(bits=(2,4,6))"],
      "budget": each("budget(bytes={})", bytes_),
      "guarded, by error": each(
        f"guarded(bytes={entries},max_error={{}})", coarse
      ),
    },
    "Entropy coded by zstd": {
      "symmetric, coded": each("int{}(entropy=zstd)"),
      "a scale a channel": each("int{}(granularity=channel,entropy=zstd)"),
      "stochastic": each("int{}(rounding=stochastic,entropy=zstd)"),
      "QSGD, L2 norm": each(
        "qsgd(levels={},entropy=zstd)", (7, 15, 31, 63, 127)
      ),
      "the largest (top-k)": each("topk(ratio={},entropy=zstd)", _SHARES),
      "float8": ["float8(entropy=zstd)"],
    },
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
  """Encodes, packs and decodes an update with each codec.

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

    def encode(key, update, codec=codec):
      payload, _ = codec.encode(key, update, codec.init(update))
      return payload, codec.decode(payload)

    # One program a codec, whose compilation takes all the time.
    payload, decoded = jax.jit(encode)(key, update)
    message = codec.pack(payload)
    error = float(trees.squared_norm(trees.subtract(update, decoded)))
    snr = 10 * np.log10(energy / error) if error else np.inf
    points.append(Point(spec, 8 * len(message) / trees.size(update), snr))
  return points


# What the panels show, bits and dB; what lies beyond is told in the legend.
_BITS, _SNR = (0.0, 8.7), (-11.0, 47.0)


def draw(
  curves: Mapping[str, Mapping[str, Sequence[Point]]],
) -> mpl_figure.Figure:
  """Draws signal-to-noise ratio against bits an entry, a panel a family.

  Args:
    curves: title of a panel -> label -> points, as `measure` gives them for
      `panels`; the points of `REFERENCE` lie in grey under all panels.
  """
  columns = -(-len(curves) // 2)
  fig = style.new_figure(3.7 * columns, 8.6)
  axes = fig.subplots(2, columns, sharex=True, sharey=True, squeeze=False)
  every = {label: p for lines in curves.values() for label, p in lines.items()}
  for ax, (title, lines) in zip(axes.flat, curves.items(), strict=False):
    if REFERENCE not in lines:
      bits, snr = _line(every.get(REFERENCE, ()))
      ax.plot(bits, snr, color=style.RULE, linewidth=2.5, zorder=1)
    looks = style.styles(lines)
    for label, points in lines.items():
      bits, snr = _line(points)
      ax.plot(
        bits,
        snr,
        color=looks[label].color,
        marker=looks[label].marker,
        markersize=4,
        linewidth=1,
        label=label + _beyond(points),
      )
    ax.axhline(0, color=style.MUTED, linewidth=0.8, linestyle="--", zorder=1)
    ax.set_title(title, loc="left", fontsize=10, color=style.INK)
    ax.legend(
      frameon=False,
      fontsize=7.5,
      loc="upper left",
      handlelength=1.6,
      labelspacing=0.3,
    )
    style.clean(ax)
  axes[0, 0].set(xlim=_BITS, ylim=_SNR, xticks=range(0, 9, 2))
  for ax in axes[:, 0]:
    ax.set_ylabel("Signal to noise, dB", color=style.INK)
  for ax in axes[-1]:
    ax.set_xlabel("Bits an entry on the wire", color=style.INK)
  return fig


def _line(points: Sequence[Point]) -> tuple[list[float], list[float]]:
  return [p.bits for p in points], [p.snr_db for p in points]


def _beyond(points: Sequence[Point]) -> str:
  (least, most), (low, high) = _BITS, _SNR
  far = [
    p for p in points if not (least < p.bits < most and low < p.snr_db < high)
  ]
  told = [f"{p.bits:.0f} bits: {p.snr_db:.0f} dB" for p in far]
  return f" ({', '.join(told)})" if told else ""
