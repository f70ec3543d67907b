"""The claims of a paper, each judged by what a study measured.

Every claim is a pure function of `evidence.Results`. A verdict is `holds` or
`fails` only where the interval decides it; else it is `open`, with the reason.
No defence is called protected: it stopped the attacks that were tried, or did
not.

Source of the claims: Ovi, Dey, Roy, Gangopadhyay, "Mixed precision quantization
to tackle gradient leakage attacks in federated learning", arXiv 2210.13457, and
its follow-up of 2023.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats

from mpqfl_jax import metrics, specs
from mpqfl_jax.report import evidence, findings, style, tables
from mpqfl_jax.report.evidence import Results

HOLDS, FAILS, OPEN = "holds", "fails", "open"

# An update leaks where surely more than one image in twenty is rebuilt, and an
# attack is stopped where surely fewer than one in five is: sixteen failures of
# sixteen are enough.
LEAKS_FROM = 0.05
STOPPED_TO = 0.2
# More than this above the best guess without an attack, and something shows.
SHOWS_DB = findings.SHOWS_DB
# The largest loss of accuracy that counts as minimal, points.
MINIMAL_POINTS = 1.0
MIN_SEEDS = 3
# The paper's attacks.
PAPER_ATTACKS = ("dlg", "inverting_gradients", "rgap")
_NAMES = {
  "dlg": "DLG",
  "inverting_gradients": "Inverting Gradients",
  "rgap": "R-GAP",
}


class Claim(NamedTuple):
  """What the evidence says of one claim.

  Attributes:
    key: `a` to `i`.
    statement: the claim.
    verdict: `holds`, `fails` or `open`.
    value, low, high: the figure that decides, and its 95 % interval; None
      where there is none.
    unit: of the figure.
    found: (data set, or other part, and what was found there), in plain words;
      why, where the claim is open. The name is empty where there are no parts.
  """

  key: str
  statement: str
  verdict: str
  value: float | None
  low: float | None
  high: float | None
  unit: str
  found: tuple[tuple[str, str], ...]

  @property
  def words(self) -> str:
    """All that was found, in one paragraph."""
    return " ".join(f"{n}: {words}" if n else words for n, words in self.found)


class Finding(NamedTuple):
  """What the evidence of one data set says: a claim's parts before its words.

  Attributes:
    verdict: as in `Claim`.
    figure: that decides.
    words: one or two sentences.
  """

  verdict: str
  figure: evidence.Interval | None
  words: str


def combine(
  key: str, statement: str, unit: str, found: dict[str, Finding], none: str
) -> Claim:
  """One claim from findings: it holds where it holds on every data set.

  The figure is that of the first data set (or scheme, or attack) that decides.

  Args:
    key, statement, unit: of the claim.
    found: data set, or other part -> finding.
    none: why the claim is open where there is no finding.
  """
  if not found:
    return Claim(key, statement, OPEN, None, None, None, unit, (("", none),))
  order = (FAILS, OPEN, HOLDS)
  verdict = min((f.verdict for f in found.values()), key=order.index)
  figures = [f.figure for f in found.values() if f.verdict == verdict]
  figure = next((f for f in figures if f is not None), None)
  told = tuple((name, f.words) for name, f in found.items())
  if figure is None:
    return Claim(key, statement, verdict, None, None, None, unit, told)
  return Claim(key, statement, verdict, *figure, unit, told)


def main_mixed(results: Results) -> str | None:
  """The mixed scheme that the claims are about: `paper`, else another."""
  names = [n for n in evidence.defenses(results) if evidence.is_mixed(n)]
  paper = [n for n in names if style.family(n) == "paper"]
  return next(iter(paper + names), None)


def leaks(results: Results) -> Claim:
  """(a) Undefended updates leak images, covertly."""
  found = {}
  for name in evidence.datasets(results):
    top = evidence.strongest(evidence.lines(results, name, "none"))
    if top is None:
      continue
    twin = next((t for t in results.twins if t["dataset"] == name), None)
    text = f"{_attack(top)} rebuilt {_counted(top.rate)} images"
    text += f" (median {top.median.value:.1f} dB)."
    if top.rate.high < LEAKS_FROM:
      verdict = FAILS
    elif top.rate.low <= LEAKS_FROM:
      verdict = OPEN
      text += " Too few to be sure."
    elif twin is None:
      verdict = OPEN
      text += " Whether watching changes training was not tested."
    elif twin["watched"] != twin["unwatched"]:
      verdict = FAILS
      text += " But training under the adversary ends at other weights."
    else:
      verdict = HOLDS
      text += " Training ends at the same bits with and without the adversary."
    found[name] = Finding(verdict, _rate(top.rate), text)
  return combine(
    "a",
    "Undefended updates leak private images, and nobody notices.",
    "rate",
    found,
    "No attack was run on undefended updates.",
  )


def stopped(
  results: Results,
  dataset: str,
  defense: str,
  knowledge: str | None,
  attacks: Iterable[str] | None = None,
) -> Finding | None:
  """Whether a defence stops attacks that work on undefended updates.

  Args:
    results: of the study.
    dataset, defense: names.
    knowledge: `blind`, `adaptive`, or None for any.
    attacks: families, None for any.

  Returns:
    What the strongest of them came to; None where none was tried.
  """
  found = evidence.lines(
    results, dataset, defense, knowledge=knowledge, attacks=attacks
  )
  top = evidence.strongest(found)
  if top is None:
    return None
  figure = _rate(top.rate)
  text = (
    f"{_attack(top)} rebuilt {_counted(top.rate)} images, median"
    f" {top.median.value:.1f} dB"
  )
  best = evidence.best_reference(results, dataset)
  above = None
  if best is not None:
    guess = tables.REFERENCE_NAMES.get(best[0], best[0])
    text += f" against {best[1]:.1f} dB for a guess ({guess})"
    above = top.median.value - best[1]
  if top.rate.low > LEAKS_FROM:
    return Finding(FAILS, figure, f"{text}.")
  if above is not None and (top.median.low or 0.0) > best[1] + SHOWS_DB:  # type: ignore[index]
    return Finding(FAILS, figure, f"{text}: it leaks in part.")
  bare = evidence.lines(
    results, dataset, "none", knowledge=knowledge, attacks=attacks
  )
  works = evidence.strongest(bare)
  if works is None or works.rate.low <= LEAKS_FROM:
    text += ", but no such attack is shown to work on undefended updates."
    return Finding(OPEN, figure, text)
  if top.rate.high >= STOPPED_TO:
    return Finding(OPEN, figure, f"{text}: too few images to be sure.")
  if best is None:
    return Finding(OPEN, figure, f"{text}: no reference to compare with.")
  if above is not None and above > SHOWS_DB:
    return Finding(OPEN, figure, f"{text}: it may leak in part.")
  return Finding(HOLDS, figure, f"{text}.")


def _stops(results: Results, key: str, knowledge: str, statement: str) -> Claim:
  mixed = main_mixed(results)
  if mixed is None:
    return combine(key, statement, "rate", {}, "No mixed scheme in the grid.")
  found = {}
  for name in evidence.datasets(results):
    # Each attack on its own: what one cannot do says nothing of the others.
    wanted = PAPER_ATTACKS if knowledge == "blind" else _tried(results, name)
    parts = {
      a: f
      for a in wanted
      if (f := stopped(results, name, mixed, knowledge, [a])) is not None
    }
    if not parts:
      continue
    joined = combine(key, statement, "rate", parts, "")
    text = " ".join(part.words for part in parts.values())
    verdict = joined.verdict
    missing = [a for a in wanted if a not in parts]
    if missing and verdict == HOLDS:
      verdict = OPEN
      text += f" Not tried: {', '.join(_NAMES.get(a, a) for a in missing)}."
    if verdict == HOLDS and knowledge == "blind":
      text += " None of these attacks knows the codec."
    elif verdict == HOLDS:
      text += " Attacks that were not tried may still succeed."
    # None for the value can only be where no part has a figure, and all have.
    figure = evidence.Interval(joined.value or 0.0, joined.low, joined.high)
    found[name] = Finding(verdict, figure, text)
  return combine(
    key, statement, "rate", found, f"No {knowledge} attack on {mixed} was run."
  )


def stops_blind(results: Results) -> Claim:
  """(b) Mixed precision and mode stops the paper's attacks, blind."""
  return _stops(
    results,
    "b",
    "blind",
    "Mixed precision and mode stops DLG, Inverting Gradients and R-GAP by an"
    " attacker who takes the update at face value.",
  )


def stops_adaptive(results: Results) -> Claim:
  """(c) It also stops an attacker who knows the codec."""
  return _stops(
    results,
    "c",
    "adaptive",
    "Mixed precision and mode also stops an attacker who knows the codec.",
  )


def costs_little(results: Results) -> Claim:
  """(d) The mixed scheme's loss of accuracy is minimal."""
  mixed = main_mixed(results)
  found = {}
  for name in evidence.datasets(results) if mixed else ():
    pair = evidence.accuracy_difference(results, name, "none", mixed or "")
    if pair is None:
      continue
    drop, seeds = pair
    text = f"{mixed} costs {_points(drop)} over {_seeds(seeds)}."
    if seeds < MIN_SEEDS:
      verdict = OPEN
      text += f" {MIN_SEEDS} seeds are needed to judge."
    elif drop.high is not None and drop.high < MINIMAL_POINTS:
      verdict = HOLDS
    elif drop.low is not None and drop.low > MINIMAL_POINTS:
      verdict = FAILS
    else:
      verdict = OPEN
      text += f" The interval does not exclude {MINIMAL_POINTS:g} point."
    found[name] = Finding(verdict, drop, text)
  return combine(
    "d",
    "The mixed scheme costs hardly any accuracy (less than one point).",
    "points",
    found,
    "No mixed scheme was trained beside undefended updates.",
  )


def noise_costs_more(results: Results) -> Claim:
  """(e) DP noise strong enough to stop the same attack costs more accuracy."""
  mixed = main_mixed(results)
  private = [
    n for n in evidence.defenses(results) if style.family(n).startswith("dp_")
  ]
  found = {}
  for name in evidence.datasets(results) if mixed and private else ():
    enough = [
      n
      for n in private
      if (f := stopped(results, name, n, None)) is not None
      and f.verdict == HOLDS
    ]
    known = {
      n: pair
      for n in enough
      if (pair := evidence.accuracy_difference(results, name, mixed or "", n))
    }
    if not known:
      found[name] = Finding(
        OPEN, None, "No noise in the grid is shown to stop the attacks tried."
      )
      continue
    # The one that stops them at the least cost.
    chosen = min(known, key=lambda n: known[n][0].value)
    gap, seeds = known[chosen]
    text = f"{chosen} costs {_points(gap)} more than {mixed} ({_seeds(seeds)})."
    own = stopped(results, name, mixed or "", None)
    if own is None or own.verdict != HOLDS:
      text += f" Unlike it, {mixed} is not shown to stop the same attacks."
    verdict = OPEN
    if seeds < MIN_SEEDS:
      text += f" {MIN_SEEDS} seeds are needed to judge."
    elif gap.low is not None and gap.low > 0:
      verdict = HOLDS
    elif gap.high is not None and gap.high <= 0:
      verdict = FAILS
    else:
      text += " The interval does not exclude that they cost the same."
    found[name] = Finding(verdict, gap, text)
  return combine(
    "e",
    "Differential privacy strong enough to stop the same attack costs more"
    " accuracy.",
    "points",
    found,
    "No noise mechanism beside a mixed scheme in the grid.",
  )


def encryption_grows(results: Results) -> Claim:
  """(f) HE's key generation and traffic grow with clients."""
  statement = (
    "Homomorphic encryption's key generation and key traffic grow with the"
    " number of clients."
  )
  rows = [r for r in results.encryption or () if r.get("source") != "modelled"]
  found = {}
  for scheme in dict.fromkeys(r["scheme"] for r in rows):
    mine = sorted(
      (r for r in rows if r["scheme"] == scheme), key=lambda r: r["clients"]
    )
    if len({r["clients"] for r in mine}) < 3:
      found[scheme] = Finding(
        OPEN, None, "fewer than three numbers of clients were measured."
      )
      continue
    slopes = {
      what: _slope(mine, name)
      for what, name in (
        ("key generation", "key_seconds_total"),
        ("key traffic", "key_bytes"),
      )
    }
    text = f"from {mine[0]['clients']} to {mine[-1]['clients']} clients, "
    text += " and ".join(
      f"{what} grows as their number to the power {tables.fixed(s.value, 2)}"
      for what, s in slopes.items()
    )
    lows = [s.low for s in slopes.values() if s.low is not None]
    highs = [s.high for s in slopes.values() if s.high is not None]
    verdict = OPEN
    # Below a tenth, nothing to speak of grows.
    if min(lows) > 0.1:
      verdict = HOLDS
    elif min(highs) < 0.5:
      verdict = FAILS
    least = min(slopes.values(), key=lambda s: s.value)
    found[scheme] = Finding(verdict, least, f"{text}.")
  return combine(
    "f",
    statement,
    "exponent",
    found,
    "No costs of encryption were given (--study_encryption).",
  )


def pruning_is_delicate(results: Results) -> Claim:
  """(g) Pruning needs a delicate ratio."""
  sparse = {}
  for name in evidence.defenses(results):
    if style.family(name) in evidence.SPARSE:
      ratio = specs.parse(name)[1].get("ratio")
      if style.family(name) == "prune":
        sparse[name] = 0.9 if ratio is None else ratio
  statement = (
    "Pruning needs a delicate ratio: too little leaks, too much costs accuracy."
  )
  found = {}
  for name in evidence.datasets(results) if len(sparse) >= 3 else ():
    works: list[float] = []
    unknown: list[float] = []
    told: list[str] = []
    for defense, ratio in sorted(sparse.items(), key=lambda item: item[1]):
      hides = stopped(results, name, defense, None)
      pair = evidence.accuracy_difference(results, name, "none", defense)
      if hides is None or pair is None:
        unknown.append(ratio)
        continue
      drop = pair[0]
      low, high = (
        drop.value if end is None else end for end in (drop.low, drop.high)
      )
      # A ratio works if it does both; to know that one fails is enough.
      if hides.verdict != FAILS and low < MINIMAL_POINTS:
        sure = hides.verdict == HOLDS and high < MINIMAL_POINTS
        (works if sure else unknown).append(ratio)
      does = {HOLDS: "stops", FAILS: "leaks", OPEN: "may leak"}[hides.verdict]
      cost = tables.fixed(drop.value, 1).replace("-", tables.MINUS)
      told.append(f"{ratio:g} {does} and costs {cost} points")
    text = "; ".join(told) + "." if told else "Nothing is sure of any ratio."
    figure = evidence.Interval(
      float(len(works)), min(works, default=None), max(works, default=None)
    )
    verdict = FAILS if len(works) >= 2 else OPEN if unknown else HOLDS
    if unknown and verdict == OPEN:
      text += f" Not known of {', '.join(f'{r:g}' for r in unknown)}."
    found[name] = Finding(verdict, figure, text)
  return combine(
    "g",
    statement,
    "ratios that stop the attacks for less than a point",
    found,
    "Fewer than three ratios of pruning in the grid.",
  )


def holds_throughout(results: Results) -> Claim:
  """(i) How it holds as training proceeds, with batch size and local steps."""
  statement = (
    "The mixed scheme hides images throughout: at initial and trained weights,"
    " in larger batches and over several local steps"
  )
  populations = {a.get("num_clients") for a in results.attacks} - {None}
  several = len(populations) > 1
  statement += ", of few clients and many." if several else "."
  mixed = main_mixed(results)
  found = {
    name: finding
    for name in evidence.datasets(results)
    if mixed
    and (finding := _throughout(results, name, mixed, several)) is not None
  }
  return combine(
    "i", statement, "rate", found, "No attack on a mixed scheme was run."
  )


def _throughout(
  results: Results, dataset: str, mixed: str, several: bool
) -> Finding | None:
  places = sorted(
    {evidence.setting(a) for a in results.attacks if a["dataset"] == dataset}
  )
  tops, told = {}, []
  for place in places:
    top, bare = (
      evidence.strongest(evidence.lines(results, dataset, name, where=place))
      for name in (mixed, "none")
    )
    if top is None:
      continue
    text = f"{_place(place, several)} {_counted(top.rate)}, median"
    text += f" {top.median.value:.1f} dB"
    if bare is None or bare.rate.low <= LEAKS_FROM:
      text += " (not shown to work on undefended updates)"
    else:
      tops[place] = top
    told.append(text)
  if not told:
    return None
  words = "; ".join(told) + "."
  if not tops:
    return Finding(OPEN, None, words)
  worst = max((t.rate for t in tops.values()), key=lambda r: r.low)
  figure = _rate(worst)
  if worst.low > LEAKS_FROM:
    return Finding(FAILS, figure, words)
  missing = [
    what
    for axis, what in enumerate(("trained weights", "local steps", "batch"))
    if not any(_differ_in(a, b) == {axis} for a in tops for b in tops)
  ]
  if missing:
    words += f" Not varied by itself: {', '.join(missing)}."
  return Finding(OPEN if missing else HOLDS, figure, words)


def _differ_in(a: tuple, b: tuple) -> set[int]:
  """Which parts of two settings differ; initial weights suit all clients."""
  out = {i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y}
  return out - {3} if "initial" in (a[0], b[0]) else out


def _tried(results: Results, dataset: str) -> list[str]:
  """Names of the adaptive attacks on undefended or other updates."""
  return list(
    dict.fromkeys(
      a["attack"]
      for a in results.attacks
      if a["dataset"] == dataset and a["knowledge"] == "adaptive"
    )
  )


def _slope(rows: Sequence[evidence.Line], name: str) -> evidence.Interval:
  """Exponent of a power of the number of clients, with its t interval."""
  x = np.log([r["clients"] for r in rows])
  y = np.log(np.maximum([r[name] for r in rows], 1e-12))
  slope, start = np.polyfit(x, y, 1)
  left = float(np.sum((y - start - slope * x) ** 2)) / (len(rows) - 2)
  half = scipy.stats.t.ppf(0.975, len(rows) - 2) * np.sqrt(
    left / np.sum((x - x.mean()) ** 2)
  )
  return evidence.Interval(
    float(slope), float(slope - half), float(slope + half)
  )


def _rate(rate: metrics.Rate) -> evidence.Interval:
  return evidence.Interval(rate.rate, rate.low, rate.high)


def _counted(rate: metrics.Rate) -> str:
  return f"{rate.successes} of {rate.trials}"


def _attack(top: evidence.Strongest) -> str:
  return f"{top.attack} ({top.knowledge})"


def _place(place: tuple, several: bool) -> str:
  weights, steps, batch, clients = place
  plural = "" if steps == 1 else "s"
  of = f" ({clients:,} clients)" if clients and several else ""
  return f"{weights} weights{of}, {steps} step{plural} of {batch}:"


def _points(value: evidence.Interval) -> str:
  text = f"{value.value:.1f} points"
  if value.low is not None and value.high is not None:
    text += f" (95% interval {value.low:.1f} to {value.high:.1f})"
  return text.replace("-", tables.MINUS)


def _seeds(count: int) -> str:
  return f"{count} seed" + ("" if count == 1 else "s")


def judge(
  results: Results, more: Sequence[Callable[[Results], Claim]] = ()
) -> list[Claim]:
  """All claims, in order of their keys.

  Args:
    results: of the study.
    more: claims of other modules.
  """
  every = (
    *(leaks, stops_blind, stops_adaptive, costs_little, noise_costs_more),
    *(encryption_grows, pruning_is_delicate, holds_throughout, *more),
  )
  return sorted((claim(results) for claim in every), key=lambda c: c.key)
