"""Privacy against accuracy against bytes: Pareto set and figure."""

from collections.abc import Sequence
import pathlib
from typing import Any, NamedTuple

from matplotlib import lines as mpl_lines
import numpy as np

from mpqfl_jax import metrics
from mpqfl_jax.report import evidence, figures, style, tables
from mpqfl_jax.report.evidence import Results


class Point(NamedTuple):
  """One defence on one data set.

  Attributes:
    dataset, defense: names.
    accuracy: mean over seeds, in percent; None where it was not trained.
    deviation: over seeds, points; None for fewer than two.
    seeds: how many.
    uplink_bytes: of a client and round.
    epsilon: largest over seeds, None without a proof.
    blind, adaptive: the strongest attack of each knowledge, in the setting
      that suits an attacker best.
    strongest: of both.
    pareto: whether no other defence is at least as good in privacy, accuracy
      and bytes and better in one; None where one of the three is unknown.
  """

  dataset: str
  defense: str
  accuracy: float | None
  deviation: float | None
  seeds: int
  uplink_bytes: float | None
  epsilon: float | None
  blind: evidence.Strongest | None
  adaptive: evidence.Strongest | None
  strongest: evidence.Strongest | None
  pareto: bool | None


def points(results: Results) -> list[Point]:
  """Every defence on every data set, the Pareto sets marked."""
  out: list[Point] = []
  for dataset in evidence.datasets(results):
    mine = [
      _point(results, dataset, name) for name in evidence.defenses(results)
    ]
    out += [p._replace(pareto=_undominated(p, mine)) for p in mine]
  return out


def _point(results: Results, dataset: str, defense: str) -> Point:
  runs = evidence.accuracies(results, dataset, defense)
  shares = [100 * line["test_accuracy"] for line in runs.values()]
  found = evidence.lines(results, dataset, defense)
  tops = {
    knowledge: evidence.strongest(
      [a for a in found if a["knowledge"] == knowledge]
    )
    for knowledge in ("blind", "adaptive")
  }
  epsilons = [
    line["epsilon"] for line in runs.values() if line.get("epsilon") is not None
  ]
  return Point(
    dataset,
    defense,
    float(np.mean(shares)) if shares else None,
    float(np.std(shares, ddof=1)) if len(shares) > 1 else None,
    len(shares),
    evidence.uplink_bytes(results, dataset, defense),
    max(epsilons, default=None),
    tops["blind"],
    tops["adaptive"],
    evidence.strongest(found),
    None,
  )


def _merits(p: Point) -> tuple[float, float, float] | None:
  """Privacy, accuracy and bytes, each the better the smaller."""
  if p.accuracy is None or p.uplink_bytes is None or p.strongest is None:
    return None
  return p.strongest.median.value, -p.accuracy, p.uplink_bytes


def _undominated(p: Point, others: Sequence[Point]) -> bool | None:
  own = _merits(p)
  if own is None:
    return None
  rivals = [m for m in map(_merits, others) if m is not None and m != own]
  return not any(
    all(o <= m for o, m in zip(rival, own, strict=True)) for rival in rivals
  )


def draw(results: Results, folder: pathlib.Path) -> figures.Figure | None:
  """Accuracy against the strongest attack, a panel a data set.

  The area of a mark is its bytes; the Pareto set is filled.

  Args:
    results: of the study.
    folder: where `frontier.png` goes.

  Returns:
    The figure; None where no defence has both accuracy and attacks.
  """
  found = [p for p in points(results) if _merits(p) is not None]
  if not found:
    return None
  looks = style.styles(evidence.defenses(results))
  names = list(dict.fromkeys(p.dataset for p in found))
  each = max(3.4, 0.24 * len(looks) + 1.2)
  fig = style.new_figure(8, each * len(names) + 0.5)
  axes = fig.subplots(len(names), 1, squeeze=False)[:, 0]
  biggest = max(p.uplink_bytes or 0 for p in found)

  def area(size: float) -> float:
    return 18 + 130 * size / biggest

  plans = []
  for ax, dataset in zip(axes, names, strict=True):
    style.clean(ax)
    mine = [p for p in found if p.dataset == dataset]
    places = []
    for p in mine:
      look = looks[p.defense]
      x, y, size = _coordinates(p)
      ax.scatter(
        [x],
        [y],
        s=area(size),
        marker=look.marker,
        facecolor=look.color if p.pareto else "white",
        edgecolor=look.color,
        linewidth=1.4,
        zorder=3,
      )
      places.append((x, y))
      ax.errorbar(
        [x], [y], [p.deviation or 0.0], color=look.color, lw=1, alpha=0.5
      )
    values = [
      y + side * (p.deviation or 0.0)
      for (_, y), p in zip(places, mine, strict=True)
      for side in (-1, 1)
    ]
    room = 0.22 * max(max(values) - min(values), 1)
    ax.set_ylim(min(values) - room, max(values) + 1.4 * room)
    ax.set_xlim(0, max(26, 1.12 * max(x for x, _ in places)))
    ax.set_title(dataset, fontsize=10, loc="left", color=style.INK, pad=16)
    ax.set_ylabel("Test accuracy, %", fontsize=10)
    rules, notes = _rules(ax, results, dataset)
    plans.append((ax, places, [looks[p.defense] for p in mine], rules, notes))
  axes[-1].set_xlabel("PSNR of the strongest attack, dB (median)", fontsize=10)
  fig.legend(handles=_key(biggest, area), **_LEGEND)
  fig.canvas.draw()
  fig.set_layout_engine("none")
  for ax, places, own, rules, notes in plans:
    style.label_points(ax, places, own, notes, rules)
  path = folder / "frontier.png"
  fig.savefig(path)
  said = [
    f"{p.dataset}, {p.defense}: {p.accuracy:.1f}%, {p.uplink_bytes:,.0f} bytes,"
    f" {p.strongest.median.value:.1f} dB"  # type: ignore[union-attr]
    for p in found
  ]
  return figures.Figure(
    path,
    "Privacy, accuracy and bytes",
    "Scatter plots of accuracy against the strongest attack. "
    + "; ".join(said)
    + ".",
    "Up and to the left is better; the area of a mark is its bytes, the bar the"
    " deviation over seeds. Filled: no other defence is at least as good in all"
    " three. Right of the"
    f" {metrics.SUCCESS_DB:.0f} dB line the private image is there to see.",
    800,
  )


_LEGEND: dict[str, Any] = {
  "loc": "outside upper right",
  "ncols": 5,
  "frameon": False,
  "fontsize": 8,
  "labelcolor": style.MUTED,
  "handletextpad": 0.3,
}


def _coordinates(p: Point) -> tuple[float, float, float]:
  merits = _merits(p)
  assert merits is not None  # only such points are drawn
  return merits[0], -merits[1], merits[2]


def _key(biggest: float, area) -> list[mpl_lines.Line2D]:
  """Filled and hollow, and three sizes."""

  def mark(label: str, face: str, size: float) -> mpl_lines.Line2D:
    return mpl_lines.Line2D(
      [],
      [],
      linestyle="",
      marker="o",
      markersize=size**0.5,
      markerfacecolor=face,
      markeredgecolor=style.MUTED,
      label=label,
    )

  return [
    mark("Pareto set", style.MUTED, area(biggest / 4)),
    mark("dominated", "white", area(biggest / 4)),
    *(
      mark(f"{share * biggest / 1e3:,.1f} kB", "white", area(share * biggest))
      for share in (0.1, 0.5, 1.0)
    ),
  ]


def _rules(ax, results: Results, dataset: str):
  """Lines at what counts as rebuilt and at the best guess, with their names."""
  marks = [(metrics.SUCCESS_DB, "rebuilt", style.ALERT)]
  best = evidence.best_reference(results, dataset)
  if best is not None:
    name = tables.REFERENCE_NAMES.get(best[0], best[0])
    marks.append((best[1], f"best guess: {name}", style.MUTED))
  return style.rules(ax, marks)
