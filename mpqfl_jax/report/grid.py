"""Originals beside their reconstructions, pixel by pixel.

Drawn in the pixels of the PNG: every image is enlarged by a whole number, so
that the pixels of a 28 by 28 digit stay squares.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from matplotlib import figure as mpl_figure
from matplotlib import patches
import numpy as np

from mpqfl_jax import metrics
from mpqfl_jax.report import records, style

_COLUMNS = 8
_FEW = 4
_ROWS = 14
# The rest in pixels of the PNG, which is shown at half size.
_CELL = 152
_GAP = 20
_TEXT = 62
_MARGIN = 24
_DOT = " · "


class Drawn(NamedTuple):
  """A grid and the words that go with it."""

  figure: mpl_figure.Figure
  title: str
  alt: str
  caption: str
  width: int


def groups(
  sets: Iterable[records.Reconstructions],
) -> list[list[records.Reconstructions]]:
  """Sets that belong in one grid: one attack, one round, the same originals.

  A grid that would grow too tall is split by the adversary's knowledge.
  """
  out: dict[tuple, list[records.Reconstructions]] = {}
  for s in sets:
    key = (s.attack, s.round, s.original.shape, s.original.tobytes())
    out.setdefault(key, []).append(s)
  final = []
  for group in out.values():
    regimes = list(dict.fromkeys(s.knowledge for s in group))
    if len(group) <= _ROWS:
      final.append(group)
    else:
      final += [[s for s in group if s.knowledge == k] for k in regimes]
  return final


def settings(run: records.Run, group: Sequence[records.Reconstructions]) -> str:
  """The assumptions under which a group was attacked, in one line."""
  regimes = list(dict.fromkeys(s.knowledge for s in group))
  lines = [
    line
    for line in run.attacks
    if line["attack"] == group[0].attack
    and line["round"] == group[0].round
    and line["knowledge"] in regimes
  ]
  regime = " and ".join(regimes) + " adversary"
  return _DOT.join([regime, *describe(lines)])


def describe(lines: Sequence[dict[str, Any]]) -> list[str]:
  """What lines of `attacks.jsonl` say of the setting, each in a few words."""

  def values(name: str) -> list[Any]:
    found = (line.get(name) for line in lines)
    return list(dict.fromkeys(v for v in found if v is not None))

  def joined(name: str) -> str:
    return ", ".join(str(v) for v in values(name))

  out = []
  for name in ("dataset", "model"):
    if values(name):
      out.append(joined(name))
  if values("batch_size"):
    out.append(f"batch of {joined('batch_size')}")
  if values("local_steps"):
    plural = "" if values("local_steps") == [1] else "s"
    out.append(f"{joined('local_steps')} local step{plural}")
  if values("local_epochs") not in ([], [1]):
    out.append(f"{joined('local_epochs')} local epochs")
  if values("weights"):
    out.append(f"{joined('weights')} weights")
  if "malicious_server" in values("threat"):
    out.append("a malicious server, which changed the model")
  for known in values("labels_known"):
    out.append("labels known" if known else "labels inferred")
  if values("iterations"):
    text = f"ended within {max(values('iterations'))} iterations"
    if values("restarts") not in ([], [1]):
      text += f", {joined('restarts')} restarts"
    out.append(text)
  return out


def _title(first: records.Reconstructions) -> str:
  """The attack, and the round where there was training."""
  return first.attack + (f", round {first.round}" if first.round else "")


class Layout(NamedTuple):
  """Where everything stands, in pixels of the PNG.

  Few images stand as rows, so that the page is wide and low: the originals are
  the first column and each defence is a column. Many images stand as columns.

  Attributes:
    turned: whether images are rows.
    cell_w, cell_h: size of an image as drawn.
    pitch_x, pitch_y: from one column or row to the next.
    left, top: of the first cell.
  """

  turned: bool
  cell_w: int
  cell_h: int
  pitch_x: int
  pitch_y: int
  left: int
  top: int

  def at(self, entry: int, image: int) -> tuple[int, int]:
    """Left upper corner of an image of an entry; entry 0 is the original."""
    column, row = (entry, image) if self.turned else (image, entry)
    return self.left + column * self.pitch_x, self.top + row * self.pitch_y


def layout(
  entries: int,
  images: int,
  height: int,
  width: int,
  heading: int,
  beside: int,
) -> Layout:
  """Lays a grid out.

  Args:
    entries: sets of reconstructions.
    images: in each.
    height, width: of an image, in its own pixels.
    heading: height of what stands above the grid.
    beside: width of the widest name beside it.
  """
  turned = images <= _FEW and entries <= _COLUMNS
  factor = max(1, _CELL // max(height, width))
  cell_w, cell_h = factor * width, factor * height
  if turned:
    pitch_x, left, top = max(cell_w + _GAP, 200), 136, heading + 92
  else:
    pitch_x, top = max(cell_w, 120) + _GAP, heading + 46
    left = _MARGIN + 32 + max(beside, 150) + _GAP
  return Layout(
    turned, cell_w, cell_h, pitch_x, cell_h + _TEXT + _GAP, left, top
  )


def draw(
  group: Sequence[records.Reconstructions],
  known: dict[str, style.Style],
  setting: str,
) -> Drawn:
  """Draws the originals and beside or below them each set of reconstructions.

  Args:
    group: from `groups`.
    known: the style of each defence.
    setting: printed above the grid.
  """
  first = group[0]
  total, height, width, _ = first.original.shape
  count = min(total, _COLUMNS)
  columns = len(group) + 1 if count <= _FEW else count
  looks = [
    known.get(s.defense) or style.Style(s.defense, style.INK, "o")
    for s in group
  ]
  several = len({s.knowledge for s in group}) > 1
  names = [
    style.wrapped(look.label) + f"\n{s.knowledge}" * several
    for s, look in zip(group, looks, strict=True)
  ]
  beside = max(
    style.text_width(line, 10) for name in names for line in name.split("\n")
  )
  shape = (len(group), count, height, width)
  probe = layout(*shape, 0, beside)
  full_w = max(probe.left + columns * probe.pitch_x + _MARGIN, 900)
  heading = _wrap(setting, int((full_w - 2 * _MARGIN) / 14.2))
  above = _MARGIN + 48 + 32 * len(heading)
  plan = layout(*shape, above, beside)
  rows = count if plan.turned else len(group) + 1
  full_h = plan.top + rows * plan.pitch_y + 6

  fig = style.new_figure(full_w / style.DPI, full_h / style.DPI)
  fig.set_layout_engine("none")
  ax = fig.add_axes((0, 0, 1, 1))
  ax.set_xlim(0, full_w)
  ax.set_ylim(full_h, 0)
  ax.axis("off")

  def write(
    x: float, y: float, text: str, size: float = 8.5, **kw: Any
  ) -> None:
    kw = {"color": style.INK, "va": "top", **kw}
    ax.text(x, y, text, fontsize=size, **kw)

  def place(image: np.ndarray, x: float, y: float) -> None:
    pixels = np.clip(np.nan_to_num(image), 0, 1)
    if pixels.shape[-1] == 1:
      pixels = np.repeat(pixels, 3, axis=-1)
    ax.imshow(
      pixels,
      extent=(x, x + plan.cell_w, y + plan.cell_h, y),
      interpolation="nearest",
      aspect="auto",
    )

  def name_entry(entry: int, label: str, look: style.Style | None) -> None:
    x, y = plan.at(entry, 0)
    bold = "normal" if look else "bold"
    if plan.turned:
      if look:
        mark = y - 44 - 30 * label.count("\n")
        ax.plot([x + 8], [mark], look.marker, color=look.color, ms=7)
      write(
        x,
        y - 14,
        label,
        8.5,
        va="baseline",
        linespacing=1.2,
        weight=bold,
      )
      return
    middle = y + plan.cell_h / 2
    if look:
      ax.plot([_MARGIN + 9], [middle], look.marker, color=look.color, ms=7)
    indent = 32 if look else 0
    write(
      _MARGIN + indent,
      middle,
      label,
      10,
      va="center",
      linespacing=1.3,
      weight=bold,
    )

  write(_MARGIN, _MARGIN, _title(first), 12, weight="bold")
  for i, text in enumerate(heading):
    write(_MARGIN, _MARGIN + 48 + 32 * i, text, 9, color=style.MUTED)
  name_entry(0, "original", None)
  for i in range(count):
    x, y = plan.at(0, i)
    place(first.original[i], x, y)
    label = f"label {first.label[i]}"
    if plan.turned:
      middle = y + plan.cell_h / 2
      write(_MARGIN, middle, label, 8, color=style.MUTED, va="center")
    else:
      write(x, y - 30, label, 8, color=style.MUTED)

  said = []
  for entry, (s, look, name) in enumerate(
    zip(group, looks, names, strict=True), 1
  ):
    name_entry(entry, name, look)
    psnr = metrics.psnr_db(s.original[:count], s.reconstruction[:count])
    ssim = metrics.ssim(s.original[:count], s.reconstruction[:count])
    for i in range(count):
      x, y = plan.at(entry, i)
      good = psnr[i] >= metrics.SUCCESS_DB
      place(s.reconstruction[i], x, y)
      if good:
        ax.add_patch(
          patches.Rectangle(
            (x - 3, y - 3),
            plan.cell_w + 6,
            plan.cell_h + 6,
            fill=False,
            edgecolor=style.ALERT,
            linewidth=1.4,
          )
        )
      below = y + plan.cell_h
      write(
        x,
        below + 9,
        f"{psnr[i]:.1f} dB",
        weight="bold" if good else "normal",
        color=style.ALERT if good else style.INK,
      )
      write(x, below + 37, f"SSIM {_two(ssim[i])}", 7.5, color=style.MUTED)
    good_count = int(np.sum(psnr >= metrics.SUCCESS_DB))
    said.append(
      f"{s.defense} ({s.knowledge}): {good_count} of {count} at"
      f" {metrics.SUCCESS_DB:.0f} dB or better, median"
      f" {np.median(psnr):.1f} dB"
    )
  caption = f"Framed and bold: PSNR of {metrics.SUCCESS_DB:.0f} dB or better."
  if total > count:
    caption += f" The first {count} of {total} images."
  where = "first column, right of" if plan.turned else "first row, below"
  return Drawn(
    figure=fig,
    title=_title(first),
    alt=(
      f"Grid of images: the originals in the {where} them what the attack"
      " rebuilt. " + "; ".join(said) + "."
    ),
    caption=caption,
    width=round(full_w / 2),
  )


def _wrap(text: str, width: int) -> list[str]:
  """Breaks between settings, never inside one."""
  lines: list[str] = []
  for part in text.split(_DOT):
    if lines and len(lines[-1]) + len(_DOT) + len(part) <= width:
      lines[-1] += _DOT + part
    else:
      lines.append(part)
  return lines


def _two(value: float) -> str:
  """Two digits, without a negative zero."""
  return f"{round(value, 2) + 0.0:.2f}".replace("-", "\N{MINUS SIGN}")
