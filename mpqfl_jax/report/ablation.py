"""Mixed policies against uniform codes of as many bytes."""

from collections.abc import Iterator
import pathlib
from typing import NamedTuple

from mpqfl_jax.report import claims, evidence, style, tables
from mpqfl_jax.report.evidence import Results

# What counts as no more bytes: half a percent, for the shape of the headers.
SAME_BYTES = 1.005
# A uniform code must be this near below for the bytes to be called equal.
NEAR_BYTES = 0.9
# Late rounds of fewer images than this are one setting.
ENOUGH_IMAGES = 30
# A gain that matters, and the one that is sought.
MARGIN_DB = 0.5
GOAL_DB = 1.5


class Ablation(NamedTuple):
  """A mixed policy against the best uniform code at no more bytes.

  Attributes:
    dataset, defense: names.
    kind: what is mixed: precision, mode, both, or random for each client.
    uplink_bytes: of the policy.
    accuracy_gap: the policy's accuracy less that of undefended training.
    uniform: the uniform code that hides most at no more bytes, those left out
      that surely cost more than a point of accuracy more.
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


def compare(results: Results) -> list[Ablation]:
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
  size = evidence.uplink_bytes(results, dataset, defense)
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
    other = evidence.uplink_bytes(results, dataset, name)
    if not evidence.is_uniform(name) or other is None:
      continue
    gap = evidence.accuracy_difference(results, dataset, name, defense)
    top = evidence.strongest(
      evidence.lines(results, dataset, name, knowledge="adaptive")
    )
    if top is None or gap is None or other > SAME_BYTES * size:
      continue
    best = gap[0].value if gap[0].high is None else gap[0].high
    # A code that may cost as little is a rival: the noise of a few seeds must
    # not take the strongest one out of the comparison.
    if best >= -claims.MINIMAL_POINTS:
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
  if cost.value:
    more = "more" if cost.value > 0 else "less"
    text += f" It costs {abs(cost.value):.2f} points {more} accuracy."
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
    images: how many different ones.
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
  for a in compare(results):
    if a.uniform is None:
      continue
    for words, keep in evidence.settings(results, a.dataset, ENOUGH_IMAGES):
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


def mixing_helps(results: Results) -> claims.Claim:
  """(h) Mixing adds robustness over the best uniform precision."""
  statement = (
    "Mixing precision and mode hides more than the best uniform precision at"
    " equal bytes."
  )
  found: dict[str, claims.Finding] = {}
  looks = style.styles(evidence.defenses(results))
  rows = [a for a in compare(results) if a.kind == "precision and mode"]
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
