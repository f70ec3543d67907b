"""Privacy against accuracy against bytes: ablation, Pareto set, figure."""

from collections.abc import Callable, Iterator, Sequence
import pathlib
from typing import Any, NamedTuple

from matplotlib import lines as mpl_lines
import numpy as np

from mpqfl_jax import metrics
from mpqfl_jax.report import claims, evidence, figures, style, tables
from mpqfl_jax.report.evidence import Results

# What counts as no more bytes: half a percent, for the shape of the headers.
SAME_BYTES = 1.005
# A uniform code must be this near below for the bytes to be called equal.
NEAR_BYTES = 0.9
# A gain that matters, and the one that is sought.
MARGIN_DB = 0.5
GOAL_DB = 1.5


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


class Ablation(NamedTuple):
  """A mixed policy against the best uniform code at no more bytes.

  Attributes:
    dataset, defense: names.
    kind: what is mixed: precision, mode, both, or random for each client.
    uplink_bytes: of the policy.
    accuracy_gap: the policy's accuracy less that of undefended training.
    uniform: the uniform code that hides most at no more bytes and at most a
      point less accuracy.
    gain: how many dB less the policy gives away than `uniform`.
    sign_test_p: of the gain.
    images: how many.
    verdict: `holds` where it hides more for a point of accuracy or less,
      `fails` where it surely hides less than half a dB more, or costs more.
    words: what was found.
  """

  dataset: str
  defense: str
  kind: str
  uplink_bytes: float | None
  accuracy_gap: evidence.Interval | None
  uniform: str | None
  gain: evidence.Interval | None
  sign_test_p: float | None
  images: int
  verdict: str
  words: str


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
    _bytes(results, dataset, defense),
    max(epsilons, default=None),
    tops["blind"],
    tops["adaptive"],
    evidence.strongest(found),
    None,
  )


def _bytes(results: Results, dataset: str, defense: str) -> float | None:
  runs = evidence.accuracies(results, dataset, defense).values()
  found = [line["uplink_bytes_per_client"] for line in runs]
  return float(np.mean(found)) if found else None


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


def kind(defense: str) -> str | None:
  """What a mixed defence mixes, None for one that is not mixed."""
  if not evidence.is_mixed(defense):
    return None
  base = pathlib.PurePath(style.family(defense)).stem
  return {
    "mixed_precision": "precision only",
    "quiet_back": "precision only",
    "mixed_mode": "mode only",
    "mixed_random": "random for each client",
    "budget": "precision and mode, by error",
    "guarded": "precision and mode, by predicted leakage",
  }.get(base, "precision and mode")


def ablation(results: Results) -> list[Ablation]:
  """Every mixed policy against uniform codes, under an adaptive attacker."""
  return [
    _ablate(results, dataset, name, what)
    for dataset in evidence.datasets(results)
    for name in evidence.defenses(results)
    if (what := kind(name)) is not None
  ]


def _ablate(
  results: Results, dataset: str, defense: str, what: str
) -> Ablation:
  size = _bytes(results, dataset, defense)
  pair = evidence.accuracy_difference(results, dataset, defense, "none")
  own = evidence.strongest(
    evidence.lines(results, dataset, defense, knowledge="adaptive")
  )

  def told(verdict, words, uniform=None, gain=None, p=None, images=0):
    return Ablation(
      dataset,
      defense,
      what,
      size,
      pair[0] if pair else None,
      uniform,
      gain,
      p,
      images,
      verdict,
      words,
    )

  if own is None:
    return told(claims.OPEN, "No attacker who knows the codec was tried.")
  if size is None:
    return told(claims.OPEN, "It was not trained.")
  rivals = []
  for name in evidence.defenses(results):
    other = _bytes(results, dataset, name)
    if not evidence.is_uniform(name) or other is None:
      continue
    gap = evidence.accuracy_difference(results, dataset, name, defense)
    top = evidence.strongest(
      evidence.lines(results, dataset, name, knowledge="adaptive")
    )
    if top is None or gap is None or other > SAME_BYTES * size:
      continue
    if gap[0].value >= -claims.MINIMAL_POINTS:
      rivals.append((top.median.value, name, top, other, gap[0]))
  if not rivals:
    return told(
      claims.OPEN,
      "No uniform code of no more bytes and no less accuracy was attacked.",
    )
  _, name, top, _, cost = min(rivals, key=lambda rival: rival[:2])
  found = evidence.paired_gain(own.lines, top.lines)
  if found is None:
    return told(claims.OPEN, f"Other images than under {name}.", name)
  gain, p, images = found
  text = (
    f"{_signed(gain.value)} dB against {name} on {images} images (sign test"
    f" p = {p:.2g})."
  )
  if cost.value > 0:
    text += f" It costs {cost.value:.2f} points more accuracy."
  near = max(other for _, _, _, other, _ in rivals) >= NEAR_BYTES * size
  if gain.low is None or gain.high is None:
    verdict = claims.OPEN
    text += " One image is not enough."
  elif gain.high < MARGIN_DB or (
    cost.low is not None and cost.low > claims.MINIMAL_POINTS
  ):
    verdict = claims.FAILS
  elif cost.value > claims.MINIMAL_POINTS:
    verdict = claims.OPEN
    text += f" That is more than {claims.MINIMAL_POINTS:g} point."
  elif gain.low > 0 and p < 0.05 and near:
    verdict = claims.HOLDS
    if gain.low < GOAL_DB:
      text += f" That it is {GOAL_DB:g} dB is not sure."
  else:
    verdict = claims.OPEN
    text += (
      " The interval does not decide."
      if near
      else " No uniform code has nearly as many bytes."
    )
  return told(verdict, text, name, gain, p, images)


class Gain(NamedTuple):
  """What a mixed policy hides beyond its uniform code, in one setting.

  Attributes:
    dataset, defense, uniform: names, as in `Ablation`.
    setting: in words.
    own, other: median PSNR of the strongest adaptive attack on each, dB.
    gain: of the same images, dB.
    sign_test_p: of the gain.
    images: how many.
  """

  dataset: str
  defense: str
  uniform: str
  setting: str
  own: float
  other: float
  gain: evidence.Interval
  sign_test_p: float
  images: int


def gains(results: Results) -> Iterator[Gain]:
  """Every mixed policy against its uniform code, setting by setting."""
  for a in ablation(results):
    if a.uniform is None:
      continue
    for words, keep in settings(results, a.dataset, pooled=True):
      own, other = (
        evidence.strongest(
          evidence.lines(
            results, a.dataset, name, knowledge="adaptive", where=keep
          )
        )
        for name in (a.defense, a.uniform)
      )
      if own is None or other is None:
        continue
      found = evidence.paired_gain(own.lines, other.lines)
      if found is not None:
        gain, p, images = found
        yield Gain(
          a.dataset,
          a.defense,
          a.uniform,
          words,
          own.median.value,
          other.median.value,
          gain,
          p,
          images,
        )


def settings(
  results: Results, dataset: str, *, pooled: bool = False
) -> Iterator[tuple[str, Callable[[evidence.Line], bool]]]:
  """Settings in words, and which lines are of them.

  Clients that train hold what they hold: late updates are of all shapes, and
  told apart by round and number of clients, where there are several.

  Args:
    results: of the study.
    dataset: whose attacks.
    pooled: whether late rounds are one setting, where each has few images.
  """
  mine = [a for a in results.attacks if a["dataset"] == dataset]
  late = [a for a in mine if a["weights"] != "initial"]
  initial = {evidence.setting(a) for a in mine if a["weights"] == "initial"}

  def like(where: tuple) -> Callable[[evidence.Line], bool]:
    return lambda line: evidence.setting(line) == where

  for where in sorted(initial):
    _, steps, batch, _ = where
    words = f"batch of {batch}" + (f", {steps} steps" if steps > 1 else "")
    yield words, like(where)

  def group(line: evidence.Line) -> tuple[int, int]:
    return (line.get("num_clients", 0), 0 if pooled else line["round"])

  def then(moment: tuple[int, int]) -> Callable[[evidence.Line], bool]:
    return lambda line: line["weights"] != "initial" and group(line) == moment

  groups = sorted({group(a) for a in late})
  populations = {clients for clients, _ in groups}
  rounds = {a["round"] for a in late}
  for clients, number in groups:
    words = "trained weights"
    if len(rounds) > 1:
      words += (
        f", rounds {min(rounds)} to {max(rounds)}"
        if pooled
        else f", round {number}"
      )
    words += f", {clients:,} clients" * (len(populations) > 1)
    yield words, then((clients, number))


def mixing_helps(results: Results) -> claims.Claim:
  """(h) Mixing adds robustness over the best uniform precision."""
  statement = (
    "Mixing precision and mode hides more than the best uniform precision at"
    " equal bytes."
  )
  found: dict[str, claims.Finding] = {}
  looks = style.styles(evidence.defenses(results))
  rows = [a for a in ablation(results) if a.kind == "precision and mode"]
  for dataset in dict.fromkeys(a.dataset for a in rows):
    # The scheme holds where one of its policies does; that one is named.
    order = (claims.HOLDS, claims.OPEN, claims.FAILS)
    mine = [a for a in rows if a.dataset == dataset]
    best = min(
      mine,
      key=lambda a: (order.index(a.verdict), -(a.gain.value if a.gain else 0)),
    )
    name = looks[best.defense].label
    found[dataset] = claims.Finding(
      best.verdict, best.gain, f"{name}: {best.words}"
    )
  return claims.combine(
    "h", statement, "dB", found, "No policy mixes precision and mode."
  )


def _signed(value: float) -> str:
  return f"{value:+.1f}".replace("-", tables.MINUS)


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
