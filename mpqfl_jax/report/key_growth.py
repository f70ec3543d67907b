"""How the keys of homomorphic encryption grow with the clients, as a figure."""

from collections.abc import Sequence
import pathlib
from typing import Any

from mpqfl_jax.report import figures, style

Row = dict[str, Any]

_TITLES = {
  "key_seconds_total": "Making keys for encryption, CPU seconds",
  "key_bytes": "Keys on the wire, bytes",
}


def draw(rows: Sequence[Row], folder: pathlib.Path) -> figures.Figure:
  """Seconds and bytes of keys against clients, a panel each.

  Args:
    rows: of `python -m benchmarks.encryption`, one or more.
    folder: where `encryption.png` goes.
  """
  fig = style.new_figure(8, 3.6)
  for ax, quantity in zip(fig.subplots(1, 2), _TITLES, strict=True):
    draw_keys(ax, rows, quantity)
  path = folder / "encryption.png"
  fig.savefig(path)
  return figures.Figure(
    path,
    "Keys against clients",
    "Line charts of the seconds that making keys takes and of the bytes that"
    " they are on the wire, over the number of clients. The table below has the"
    " numbers.",
    "Both axes are logarithmic. What is dashed is modelled.",
    800,
  )


def draw_keys(
  ax, rows: Sequence[Row], quantity: str = "key_seconds_total"
) -> None:
  """Draws one quantity of the keys of each scheme; what is modelled, dashed.

  Args:
    ax: to draw on.
    rows: of `python -m benchmarks.encryption`.
    quantity: `key_seconds_total` or `key_bytes`.
  """
  style.clean(ax)
  schemes = list(dict.fromkeys(row["scheme"] for row in rows))
  for scheme, look in zip(schemes, style.styles(schemes).values(), strict=True):
    for source, dashes in (("measured", "-"), ("modelled", "--")):
      mine = [
        (row["clients"], row[quantity])
        for row in rows
        if row["scheme"] == scheme and row["source"] == source
      ]
      if mine:
        ax.plot(
          *zip(*mine, strict=True),
          color=look.color,
          linestyle=dashes,
          linewidth=1.5,
          label=scheme.replace("_", " ") if source == "measured" else None,
        )
  ax.set_xscale("log")
  ax.set_yscale("log")
  for axis in (ax.xaxis, ax.yaxis):
    axis.set_major_formatter(style.plain)
  ax.legend(frameon=False, fontsize=8)
  ax.set_title(_TITLES[quantity], fontsize=10, loc="left", color=style.INK)
  ax.set_xlabel("Clients (log); dashed: modelled", fontsize=9, color=style.INK)
