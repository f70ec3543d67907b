"""What a study measured, as tables, and the intervals that claims rest on."""

import collections
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.stats

from mpqfl_jax import metrics
from mpqfl_jax.report import style

Line = dict[str, Any]

# One precision and one mode for all layers.
UNIFORM = frozenset(
  (
    *(f"int{bits}" for bits in (*range(1, 9), 16)),
    *("float16", "bfloat16", "float8", "nf4"),
    *("sign", "ternary", "qsgd", "drive"),
  )
)
SPARSE = frozenset(("prune", "topk", "randomk"))
_RESAMPLES = 2000


class Results(NamedTuple):
  """All that a study found.

  Attributes:
    training: a line for each data set, seed and defence: `dataset, seed,
      defense, test_accuracy, uplink_bytes_per_client,
      uplink_bytes_per_client_float32, epsilon, final_params_sha256,
      accuracies`, of which the last has [round, test accuracy] of every test.
    attacks: a line for each reconstructed image, as in `attacks.jsonl`, with
      the `seed` of its run and, of an update in training, its `num_clients`.
    references: data set -> guess without an attack -> its medians over the
      attacked images.
    twins: a line for each data set: SHA-256 of the undefended model `watched`
      by an adversary and of the same run `unwatched`.
    encryption: rows of `python -m benchmarks.encryption`, None where none were
      given.
    costs: a line for each data set and defence, as in `costs.jsonl`.
    unreadable: defence -> why no attack has anything to work on; there are no
      `attacks` on such a one.
  """

  training: Sequence[Line]
  attacks: Sequence[Line]
  references: dict[str, dict[str, Line]]
  twins: Sequence[Line] = ()
  encryption: Sequence[Line] | None = None
  costs: Sequence[Line] = ()
  unreadable: Mapping[str, str] = {}


class Interval(NamedTuple):
  """An estimate with a 95 % interval; None where it has none."""

  value: float
  low: float | None
  high: float | None


class Strongest(NamedTuple):
  """The attack with the highest median PSNR among those that were tried.

  Attributes:
    attack, knowledge: its names.
    lines: its reconstructions.
    rate: of those that count as rebuilt, with Wilson's interval.
    median: PSNR, dB, with a bootstrap interval.
  """

  attack: str
  knowledge: str
  lines: list[Line]
  rate: metrics.Rate
  median: Interval


def is_mixed(defense: str) -> bool:
  """Whether layers differ in precision or mode."""
  base = style.family(defense)
  return base.endswith(".toml") or base in (
    *("paper", "mixed_random", "budget", "guarded"),
  )


def is_uniform(defense: str) -> bool:
  """Whether one code is used for every layer."""
  return style.family(defense) in UNIFORM


def datasets(results: Results) -> list[str]:
  """Names of the data sets, in the order of the study."""
  found = [*results.training, *results.attacks]
  return list(dict.fromkeys(line["dataset"] for line in found))


def defenses(results: Results) -> list[str]:
  """Names of the defences, in the order of the study."""
  found = [*results.training, *results.attacks]
  return list(dict.fromkeys(line["defense"] for line in found))


def setting(line: Line) -> tuple:
  """What else than the defence an attack's outcome depends on.

  The weights, local steps, images in each, and the number of clients, which
  only training reads: 0 elsewhere.
  """
  return (
    line["weights"],
    line["local_steps"],
    line["batch_size"],
    line.get("num_clients", 0),
  )


def settings(
  results: Results, dataset: str, enough: int = 0
) -> Iterator[tuple[str, Callable[[Line], bool]]]:
  """Settings in words, and which lines are of them.

  Clients that train hold what they hold: late updates are of all shapes, and
  told apart by round and number of clients, where there are several.

  Args:
    results: of the study.
    dataset: whose attacks.
    enough: late rounds are one setting where one of them has fewer images.
  """
  mine = [a for a in results.attacks if a["dataset"] == dataset]
  late = [a for a in mine if a["weights"] != "initial"]
  initial = {setting(a) for a in mine if a["weights"] == "initial"}

  def like(where: tuple) -> Callable[[Line], bool]:
    return lambda line: setting(line) == where

  for where in sorted(initial):
    _, steps, batch, _ = where
    words = f"batch of {batch}" + (f", {steps} steps" if steps > 1 else "")
    yield words, like(where)

  images = collections.Counter(
    r for r, _ in {(a["round"], a["image"]) for a in late}
  )
  pooled = min(images.values(), default=enough) < enough

  def group(line: Line) -> tuple[int, int]:
    return (line.get("num_clients", 0), 0 if pooled else line["round"])

  def then(moment: tuple[int, int]) -> Callable[[Line], bool]:
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


def base_setting(results: Results, dataset: str) -> tuple | None:
  """The setting that suits an attacker best: initial weights, fewest images."""
  found = {setting(a) for a in results.attacks if a["dataset"] == dataset}
  return min(
    found, key=lambda s: (s[0] != "initial", s[1] * s[2], s), default=None
  )


def lines(
  results: Results,
  dataset: str,
  defense: str,
  *,
  knowledge: str | None = None,
  attacks: Iterable[str] | None = None,
  where: tuple | Callable[[Line], bool] | None = None,
) -> list[Line]:
  """Reconstructions of one data set under one defence.

  Args:
    results: of the study.
    dataset, defense: names.
    knowledge: None for any.
    attacks: names or families of attacks (`dlg`), None for any.
    where: a `setting`, or which lines are of it; the base setting where None.
  """
  where = where or base_setting(results, dataset)
  of = where if callable(where) else lambda line: setting(line) == where
  kept = None if attacks is None else set(attacks)
  return [
    line
    for line in results.attacks
    if line["dataset"] == dataset
    and line["defense"] == defense
    and of(line)
    and knowledge in (None, line["knowledge"])
    and (kept is None or kept & {line["attack"], style.family(line["attack"])})
  ]


def strongest(found: Sequence[Line]) -> Strongest | None:
  """The strongest attack among reconstructions, None where there are none."""
  groups: dict[tuple[str, str], list[Line]] = {}
  for line in found:
    groups.setdefault((line["attack"], line["knowledge"]), []).append(line)
  if not groups:
    return None
  ranked = sorted(
    groups.items(),
    key=lambda item: (np.median(psnr(item[1])), np.max(psnr(item[1]))),
  )
  (attack, knowledge), mine = ranked[-1]
  values = psnr(mine)
  return Strongest(
    attack, knowledge, mine, metrics.success_rate(values), median(values)
  )


def psnr(found: Sequence[Line]) -> np.ndarray:
  """PSNR of each reconstruction, dB; 0 for one that diverged."""
  return np.array([line.get("psnr_db") or 0.0 for line in found])


def accuracies(results: Results, dataset: str, defense: str) -> dict[int, Line]:
  """The runs of one defence, by seed."""
  return {
    line["seed"]: line
    for line in results.training
    if line["dataset"] == dataset
    and line["defense"] == defense
    and line.get("test_accuracy") is not None
  }


def uplink_bytes(results: Results, dataset: str, defense: str) -> float | None:
  """Of a client and round, mean over the seeds; None where none trained."""
  runs = accuracies(results, dataset, defense).values()
  found = [line["uplink_bytes_per_client"] for line in runs]
  return float(np.mean(found)) if found else None


def curve(
  results: Results, dataset: str, defense: str
) -> list[tuple[int, float]]:
  """(round, mean test accuracy over the seeds) of every test."""
  found: dict[int, list[float]] = {}
  for line in accuracies(results, dataset, defense).values():
    for number, accuracy in line.get("accuracies", ()):
      found.setdefault(number, []).append(accuracy)
  return [(n, float(np.mean(found[n]))) for n in sorted(found)]


def mean(values: Sequence[float]) -> Interval:
  """Mean with Student's t interval; no interval for a single value."""
  x = np.asarray(values, float)
  if len(x) < 2:
    return Interval(float(x.mean()), None, None)
  half = scipy.stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / len(x) ** 0.5
  return Interval(
    float(x.mean()), float(x.mean() - half), float(x.mean() + half)
  )


def accuracy_difference(
  results: Results, dataset: str, defense: str, other: str
) -> tuple[Interval, int] | None:
  """Accuracy of one defence less that of another, in points, seed by seed.

  Returns:
    The mean difference with its paired t interval and the number of seeds;
    None where no seed has both.
  """
  mine = accuracies(results, dataset, defense)
  yours = accuracies(results, dataset, other)
  both = sorted(mine.keys() & yours.keys())
  if not both:
    return None
  points = [
    100 * (mine[s]["test_accuracy"] - yours[s]["test_accuracy"]) for s in both
  ]
  return mean(points), len(both)


def median(values: np.ndarray) -> Interval:
  """Median with a percentile bootstrap interval.

  Source: Efron, "Bootstrap methods: another look at the jackknife", 1979. The
  resamples come from a fixed seed, so that a report repeats to the bit.
  """
  return _bootstrap(values, np.median)


def _bootstrap(values: np.ndarray, statistic: Callable) -> Interval:
  value = float(statistic(values))
  if len(values) < 2:
    return Interval(value, None, None)
  rng = np.random.default_rng(len(values))
  picks = rng.integers(0, len(values), (_RESAMPLES, len(values)))
  low, high = np.percentile(statistic(values[picks], axis=1), (2.5, 97.5))
  return Interval(value, float(low), float(high))


def paired_gain(
  mine: Sequence[Line], other: Sequence[Line]
) -> tuple[Interval, float, int] | None:
  """How many dB less of the same images `mine` gives away than `other`.

  Args:
    mine, other: reconstructions by one attack each.

  Returns:
    The median difference with a bootstrap interval, the p-value of the
    two-sided sign test, and the number of images, of which each counts once,
    however many rounds it was in; None where no image is in both.
  """

  def by_round(found: Sequence[Line]) -> dict[tuple, float]:
    values = zip(found, psnr(found), strict=True)
    return {(a["image"], a.get("seed"), a["round"]): v for a, v in values}

  a, b = by_round(mine), by_round(other)
  of_image: dict[tuple, list[float]] = {}
  for key in sorted(a.keys() & b.keys(), key=str):
    of_image.setdefault(key[:2], []).append(b[key] - a[key])
  if not of_image:
    return None
  gains = np.array([np.mean(each) for each in of_image.values()])
  return median(gains), sign_test(gains), len(gains)


def sign_test(differences: np.ndarray) -> float:
  """Two-sided p-value of the sign test; ties are left out.

  Source: Dixon and Mood, "The statistical sign test", 1946.
  """
  moved = differences[differences != 0]
  if not len(moved):
    return 1.0
  wins = int((moved > 0).sum())
  return float(scipy.stats.binomtest(wins, len(moved)).pvalue)


def best_reference(results: Results, dataset: str) -> tuple[str, float] | None:
  """Name and median PSNR of the best guess that needs no attack."""
  known = {
    name: values["psnr_db_median"]
    for name, values in results.references.get(dataset, {}).items()
    if values.get("psnr_db_median") is not None
  }
  return max(known.items(), key=lambda item: item[1], default=None)
