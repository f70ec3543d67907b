"""What a run shows, in sentences whose every number is computed.

The words are chosen with care: an attack that failed proves nothing about
attacks that were not tried, and one that fails on undefended updates too says
nothing about any defence.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.stats

from mpqfl_jax import errors, metrics
from mpqfl_jax.report import records, style, tables


class Verdict(NamedTuple):
  """What the attacks of a run say about one defence.

  Attributes:
    defense: its name.
    status: `leaks`, `partly`, `stopped` or `open` (nothing can be said).
    label: the status in a few words.
    privacy: one or two sentences on the attacks.
    cost: one sentence on accuracy, bytes and proof; "" where nothing was
      measured.
  """

  defense: str
  status: str
  label: str
  privacy: str
  cost: str


class _Count(NamedTuple):
  """Hits among trials, and the probability of as many by luck."""

  hits: int
  trials: int
  luck: float


class _Score(NamedTuple):
  """One attack on one defence.

  Attributes:
    cell, name: which.
    rate: of images that count as rebuilt.
    images: how many there are, in words.
    spotted, above: see the functions of these names.
    median: PSNR, dB.
  """

  cell: records.Cell
  name: str
  rate: metrics.Rate
  images: str
  spotted: _Count
  above: _Count
  median: float


# What luck would do this rarely, over all attacks on a defence, is not luck.
LUCK = 0.002
# A median this far above the best guess shows something of the images.
SHOWS_DB = 3.0
# Accuracy this far above guessing, a share, is learning.
LEARNT = 0.03


def verdicts(run: records.Run) -> list[Verdict]:
  """One verdict a defence, in the order of the summary."""
  scores = {
    name: _scores(run, name, entry)
    for name, entry in run.summary["defenses"].items()
  }
  works = {
    s.cell.attack for s in scores.get("none", ()) if s.rate.successes > 0
  }
  rows = {row.defense: row for row in tables.rows(run.summary)}
  return [
    _verdict(run, name, scores[name], works, _cost(rows[name]))
    for name in run.summary["defenses"]
  ]


def headline(run: records.Run) -> list[str]:
  """The answer: what an undefended update leaks, what defences do and cost.

  Defences go by the short names of the figures.
  """
  judged = verdicts(run)
  looks = style.styles(run.summary["defenses"])
  labels = {name: look.label for name, look in looks.items()}
  out = [_undefended(run, judged)]
  others = [v for v in judged if v.defense != "none"]
  order = ("leaks", "partly", "stopped", "open")
  ranked = sorted(others, key=lambda v: order.index(v.status))
  plural = "" if len(others) == 1 else "s"
  for phrase in dict.fromkeys(_phrase(v) for v in ranked):
    same = [labels[v.defense] for v in ranked if _phrase(v) == phrase]
    out.append(
      f"{len(same)} of {len(others)} defence{plural} {phrase}:"
      f" {', '.join(same)}."
    )
  out += _prices(run.summary, labels)
  return out


def best_reference(summary: dict[str, Any]) -> tuple[str, float] | None:
  """Name and median PSNR of the best guess that needs no attack."""
  known = {
    tables.REFERENCE_NAMES.get(name, name): values["psnr_db_median"]
    for name, values in (summary.get("references") or {}).items()
    if values.get("psnr_db_median") is not None
  }
  return max(known.items(), key=lambda item: item[1], default=None)


def attack_rate(
  run: records.Run, defense: str, cell: records.Cell
) -> metrics.Rate:
  """Successes among the reconstructions in `attacks.jsonl`.

  Raises:
    UserError: there is none, though the summary speaks of the attack.
  """
  lines = attack_lines(run, defense, cell)
  if not lines:
    raise errors.UserError(
      f"{run.folder / 'attacks.jsonl'} holds no line of {_name(cell)} on"
      f" {defense}, which summary.json lists; the files are not of one run."
    )
  # A reconstruction without a PSNR failed.
  values = [line.get("psnr_db") for line in lines]
  good = [v for v in values if v is not None and v >= metrics.SUCCESS_DB]
  return metrics.wilson(len(good), len(values))


def attack_lines(
  run: records.Run, defense: str, cell: records.Cell
) -> list[dict[str, Any]]:
  """The lines of `attacks.jsonl` about one attack on one defence."""
  key = (defense, cell.attack, cell.knowledge)
  return [
    line
    for line in run.attacks
    if (line["defense"], line["attack"], line["knowledge"]) == key
    and cell.round in (None, line["round"])
  ]


def _name(cell: records.Cell) -> str:
  return f"{cell.attack} ({cell.regime})"


def interval(rate: metrics.Rate) -> str:
  """A Wilson interval as text."""
  return f"{100 * rate.low:.0f} to {100 * rate.high:.0f}%"


def _scores(
  run: records.Run, defense: str, entry: dict[str, Any]
) -> list[_Score]:
  out = []
  for cell in records.cells(entry):
    if cell.reason is not None:
      continue
    lines = attack_lines(run, defense, cell)
    rate = attack_rate(run, defense, cell)
    out.append(
      _Score(
        cell,
        _name(cell),
        rate,
        _images(lines),
        _spotted(lines),
        _above(lines),
        cell.psnr_db_median or 0.0,
      )
    )
  return out


def _images(lines: Sequence[dict[str, Any]]) -> str:
  """How many there are, and of how many updates where those have several.

  Images of one update are rebuilt, or not, together.
  """
  count = len(lines)
  updates = len({(line.get("round"), line.get("client")) for line in lines})
  text = f"{count} image{'' if count == 1 else 's'}"
  if updates == count:
    return text
  return f"{text} of {updates} update{'' if updates == 1 else 's'}"


def _spotted(lines: Sequence[dict[str, Any]]) -> _Count:
  """Reconstructions that lie nearest to their original."""
  hits = sum(bool(line.get("reidentified")) for line in lines)
  among = min(
    line.get("candidates") or metrics.MAX_CANDIDATES for line in lines
  )
  return _count(hits, len(lines), 1 / among)


def _above(lines: Sequence[dict[str, Any]]) -> _Count:
  """Updates whose images, on average, beat every guess without an attack."""
  gains: dict[tuple, list[float]] = {}
  for line in lines:
    update = gains.setdefault((line.get("round"), line.get("client")), [])
    if line.get("guess_psnr_db") is not None:
      update.append((line.get("psnr_db") or 0.0) - line["guess_psnr_db"])
  hits = sum(bool(gain) and np.mean(gain) > 0 for gain in gains.values())
  return _count(int(hits), len(gains), 0.5)


def _count(hits: int, trials: int, chance: float) -> _Count:
  test = scipy.stats.binomtest(hits, trials, chance, alternative="greater")
  return _Count(hits, trials, float(test.pvalue))


def _verdict(
  run: records.Run,
  defense: str,
  scores: Sequence[_Score],
  works: set[str],
  cost: str,
) -> Verdict:
  def verdict(status: str, label: str, privacy: str) -> Verdict:
    return Verdict(defense, status, label, privacy, cost)

  reason = records.reason(run.summary["defenses"][defense])
  if reason is not None:
    text = f"Nothing to attack: {reason}. Whoever holds the key reads it."
    return verdict("stopped", "Ciphertext", text)
  if not scores:
    return verdict("open", "Not attacked", "No attack was run against it.")
  through = [s for s in scores if s.rate.successes]
  if through:
    worst = max(through, key=lambda s: (s.median, s.rate.rate))
    text = (
      f"{worst.name} rebuilt {_of(worst)} to {metrics.SUCCESS_DB:.0f} dB"
      f" or better (95% interval {interval(worst.rate)}), median"
      f" {worst.median:.1f} dB."
    )
    return verdict("leaks", "Leaks", text + _blind_contrast(scores, worst))

  top = max(scores, key=lambda s: s.median)
  none_good = (
    f"No attack brought any image to {metrics.SUCCESS_DB:.0f} dB"
    f" ({_of(top)} by {top.name}, 95% interval {interval(top.rate)})"
  )
  reference = best_reference(run.summary)
  rare = LUCK / len(scores)
  shows = reference is not None and top.median > reference[1] + SHOWS_DB
  steady = min(scores, key=lambda s: s.above.luck)
  surely_above = steady.above.luck <= rare
  spotted = min(scores, key=lambda s: s.spotted.luck)
  surely_spotted = spotted.spotted.luck <= rare
  if shows or surely_above or surely_spotted:
    text = none_good + "."
    if shows and reference is not None:
      text += (
        f" But the median of {top.name}, {top.median:.1f} dB, beats the best"
        f" guess without an attack ({reference[0]}, {reference[1]:.1f} dB)."
      )
    elif surely_above:
      text += (
        f" But {steady.name} beats every guess without an attack on"
        f" {steady.above.hits} of {steady.above.trials} updates."
      )
    if surely_spotted:
      text += (
        f" {spotted.spotted.hits} of {spotted.spotted.trials} reconstructions"
        f" by {spotted.name} lie nearer to their original than to any other"
        " candidate image."
      )
    return verdict("partly", "Leaks in part", text)

  if "none" not in run.summary["defenses"]:
    text = f"{none_good}, but no undefended run shows that they work at all."
    return verdict("open", "Not shown", text)
  if defense == "none":
    return verdict("open", "Not shown", f"{none_good}.")
  tried = [s for s in scores if s.cell.attack in works]
  if not tried:
    text = (
      f"{none_good}, but the same attacks fail on undefended updates too: this"
      " says nothing about the defence."
    )
    return verdict("open", "Not shown", text)
  text = f"{none_good}."
  if reference is not None:
    text += (
      f" The highest median, {top.median:.1f} dB, is"
      f" {_beside(top.median - reference[1])} a guess without an attack"
      f" ({reference[0]}, {reference[1]:.1f} dB)."
    )
  found = spotted.spotted
  if found.hits:
    lie = "lies" if found.hits == 1 else "lie"
    text += (
      f" {found.hits} of {found.trials} reconstructions by {spotted.name} {lie}"
      " nearest to the original, which may be chance."
    )
  text += _labels(run, defense, scores)
  if any(s.cell.knowledge != "blind" for s in tried):
    text += " Attacks that were not tried may still succeed."
    return verdict("stopped", "Stopped the attacks tried", text)
  attacks = list(dict.fromkeys(s.cell.attack for s in tried))
  which = "this blind attack" if len(attacks) == 1 else "these blind attacks"
  text += " No attack that knows the codec was tried."
  return verdict("stopped", f"Stopped {which} ({', '.join(attacks)})", text)


def _labels(run: records.Run, defense: str, scores: Sequence[_Score]) -> str:
  """That labels were read all the same, where most of them were."""
  best: tuple[float, str] = (0.5, "")
  for s in scores:
    lines = attack_lines(run, defense, s.cell)
    found = [x["label_correct"] for x in lines if not x.get("labels_known")]
    found = [bool(x) for x in found if x is not None]
    if found and np.mean(found) > best[0]:
      text = f" Labels were read all the same: {sum(found)} of {len(found)}"
      best = (float(np.mean(found)), f"{text} by {s.name}.")
  return best[1]


def _blind_contrast(scores: Sequence[_Score], worst: _Score) -> str:
  blind = [s for s in scores if s.cell.knowledge == "blind"]
  if not blind or any(s.rate.successes for s in blind):
    return ""
  best = max(blind, key=lambda s: s.median)
  return (
    f" Blind attacks alone rebuilt none: {best.name} reached a median of"
    f" {best.median:.1f} dB."
  )


def _undefended(run: records.Run, judged: Sequence[Verdict]) -> str:
  own = {v.defense: v for v in judged}.get("none")
  if own is None:
    return (
      "This run has no undefended client: nothing here shows that the attacks"
      " work."
    )
  if not any(records.cells(run.summary["defenses"]["none"])):
    return "No attack was run on undefended updates; only the costs are known."
  start = {
    "leaks": "An undefended update gives private images away",
    "partly": "An undefended update leaks in part",
  }.get(own.status, "No image was rebuilt from an undefended update")
  end = ""
  reference = best_reference(run.summary)
  if own.status == "leaks" and reference is not None:
    end = (
      f" The best guess without an attack ({reference[0]}) scores"
      f" {reference[1]:.1f} dB."
    )
  return f"{start}: {own.privacy}{end}"


def _prices(summary: dict[str, Any], labels: dict[str, str]) -> list[str]:
  """Who pays most accuracy, who saves most bytes."""
  rows = [r for r in tables.rows(summary) if r.defense != "none"]
  entries = summary["defenses"]
  baseline = (entries.get("none") or {}).get("test_accuracy")
  out = []
  known = [
    r for r in rows if entries[r.defense].get("test_accuracy") is not None
  ]
  if known and baseline is not None:
    known.sort(key=lambda r: entries[r.defense]["test_accuracy"])
    low, high = known[0], known[-1]
    text = (
      f"Undefended training reaches {tables.percent(baseline)}% test accuracy;"
      f" {labels[low.defense]} {_reaches(low)}"
    )
    if high is not low:
      text += f", {labels[high.defense]} {_reaches(high)}"
    chance = summary.get("chance_accuracy")
    if chance is not None and baseline < chance + LEARNT:
      text += (
        f". Guessing the most frequent class reaches {tables.percent(chance)}%:"
        " nothing was learnt, and what a defence costs in accuracy cannot be"
        " read from this run"
      )
    out.append(text + ".")
  sent = [
    r
    for r in rows
    if entries[r.defense].get("uplink_bytes_per_client")
    and r.ratio != tables.MISSING
  ]
  if sent:
    least = min(
      sent, key=lambda r: entries[r.defense]["uplink_bytes_per_client"]
    )
    most = max(
      sent, key=lambda r: entries[r.defense]["uplink_bytes_per_client"]
    )
    text = f"Against float32, {labels[least.defense]} sends {_amount(least)}"
    if most is not least:
      text += f" and {labels[most.defense]} {_amount(most)}"
    out.append(text + " from each client and round.")
  return out


def _cost(row: tables.Row) -> str:
  parts = []
  if row.accuracy != tables.MISSING:
    text = f"{row.accuracy}% test accuracy"
    if row.difference != tables.MISSING:
      text += f" ({row.difference} points)"
    parts.append(text)
  if row.uplink != tables.MISSING:
    text = f"{row.uplink} bytes up"
    if row.ratio not in (tables.MISSING, tables.EQUAL):
      text += f" ({row.ratio} than float32)"
    parts.append(text)
  if row.epsilon != "no proof":
    parts.append(f"ε = {row.epsilon}")
  return "; ".join(parts) + "." if parts else ""


def _reaches(row: tables.Row) -> str:
  return f"reaches {row.accuracy}% ({row.difference} points)"


def _amount(row: tables.Row) -> str:
  return "as much" if row.ratio == tables.EQUAL else row.ratio


def _of(score: _Score) -> str:
  return f"{score.rate.successes} of {score.images}"


def _beside(difference_db: float) -> str:
  """How a median compares with a guess that it does not clearly beat."""
  return "no better than" if difference_db <= 0 else "hardly above"


def _phrase(verdict: Verdict) -> str:
  return {
    "Leaks": "let an attack rebuild images",
    "Leaks in part": "leaked in part (more than a guess shows)",
    "Ciphertext": "left the server nothing to read",
    "Not shown": "not shown to stop anything",
  }.get(verdict.label, verdict.label[0].lower() + verdict.label[1:])
