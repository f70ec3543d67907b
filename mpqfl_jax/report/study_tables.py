"""The tables of a study, as rows of text and as Markdown."""

from collections.abc import Iterable, Iterator, Sequence
import json
import pathlib
from typing import Any, NamedTuple

import numpy as np

from mpqfl_jax import errors
from mpqfl_jax.report import (
  ablation,
  claims,
  costs,
  evidence,
  findings,
  frontier,
  records,
  style,
  tables,
)


class Row(NamedTuple):
  """A defence on one data set, as text."""

  defense: str
  color: str
  accuracy: str
  difference: str
  uplink: str
  ratio: str
  epsilon: str
  blind: str
  blind_attack: str
  adaptive: str
  adaptive_attack: str
  strongest: str
  success: str
  interval: str
  pareto: str


class Table(NamedTuple):
  dataset: str
  rows: list[Row]
  references: list[tuple[str, str, str]]


class Costs(NamedTuple):
  """What the defences of a data set cost, and what that buys."""

  dataset: str
  rows: list[tuple[costs.Row, Row]]


class BySetting(NamedTuple):
  """How attacks fare on one data set, setting by setting, as text.

  Attributes:
    dataset: its name.
    settings: the columns, in words.
    rows: (defence, a cell a column: blind / adaptive, dB).
    beside: (name, a cell a column) of what is no defence.
    late: whether a column is of trained weights.
  """

  dataset: str
  settings: list[str]
  rows: list[tuple[str, list[str]]]
  beside: list[tuple[str, list[str]]]
  late: bool


class Study(NamedTuple):
  """A study's folder in memory.

  Attributes:
    folder: where it lies.
    config, summary: `config.json` and `summary.json`.
    results: what its cells measured.
  """

  folder: pathlib.Path
  config: dict[str, Any]
  summary: dict[str, Any]
  results: evidence.Results


def read(run_dir: str | pathlib.Path) -> Study:
  """Reads a finished study.

  Raises:
    UserError: the folder holds none.
  """
  folder = pathlib.Path(run_dir)
  names = ("config", "summary", "evidence")
  for name in names:
    if not (folder / f"{name}.json").is_file():
      raise errors.UserError(
        f"{folder} holds no {name}.json; expected the --output_dir of a"
        " finished study."
      )
  config, summary, rest = (
    json.loads((folder / f"{name}.json").read_text()) for name in names
  )
  return Study(
    folder,
    config,
    summary,
    evidence.Results(
      training=records.lines(folder / "training.jsonl"),
      attacks=records.lines(folder / "attacks.jsonl"),
      references=rest["references"],
      twins=rest["twins"],
      encryption=rest["encryption"],
      costs=records.lines(folder / "costs.jsonl"),
      unreadable=rest.get("unreadable", {}),
    ),
  )


def markdown(run_dir: str | pathlib.Path) -> str:
  """The claims, the defences and their costs as Markdown tables."""
  study = read(run_dir)
  parts = (claims_markdown, defenses_markdown, costs_markdown)
  return "\n".join(text for part in parts if (text := part(study)))


def defenses_markdown(study: Study) -> str:
  """Accuracy, bytes and attacks of each defence, a table a data set."""
  lines: list[str] = []
  for table in by_dataset(study):
    lines += [
      *([""] if lines else []),
      f"| {table.dataset} | Accuracy, % | Bytes | Blind, dB | Adaptive, dB |"
      " Rebuilt | Strongest |",
      "| :-- | --: | --: | --: | --: | --: | :-- |",
    ]
    lines += [
      f"| {row.defense}{' *' if row.pareto else ''} | {row.accuracy} |"
      f" {row.uplink} | {row.blind} | {row.adaptive} | {row.success} |"
      f" {_top_name(study.results, table.dataset, row.defense)} |"
      for row in table.rows
    ]
    lines += [
      f"| _{name}_ | | | {psnr} | {psnr} | | no attack |"
      for name, psnr, _ in table.references
    ]
  return "\n".join(lines) + "\n"


def gains_markdown(study: Study) -> str:
  """What mixed policies hide beyond uniform codes, setting by setting."""
  lines = [
    "| Data set | Policy | Best uniform code | Setting | dB, policy | dB,"
    " uniform | Hidden, dB | Images |",
    "| :-- | :-- | :-- | :-- | --: | --: | --: | --: |",
  ]
  lines += [
    f"| {g.dataset} | {g.defense} | {g.uniform} | {g.setting} |"
    f" {g.own:.1f} | {g.other:.1f} | {interval(g.gain, '')} | {g.images} |"
    for g in ablation.gains(study.results)
  ]
  return "\n".join(lines) + "\n"


def settings_markdown(study: Study) -> str:
  """The strongest attack on each defence, blind and adaptive, by setting."""
  lines: list[str] = []
  for table in by_setting(study):
    lines += [
      *([""] if lines else []),
      f"| {table.dataset}: blind / adaptive, dB |"
      + "".join(f" {words} |" for words in table.settings),
      "| :-- |" + " --: |" * len(table.settings),
    ]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in table.rows]
    lines += [
      f"| _{name}_ | {' | '.join(cells)} |" for name, cells in table.beside
    ]
  return "\n".join(lines) + "\n"


def by_setting(study: Study) -> Iterator[BySetting]:
  """A table a data set: the strongest attacks, setting by setting."""
  results = study.results
  for dataset in evidence.datasets(results):
    where = list(evidence.settings(results, dataset))
    if not where:
      continue
    rows = []
    for name in evidence.defenses(results):
      cells = []
      for _, keep in where:
        tops = (
          evidence.strongest(
            evidence.lines(
              results, dataset, name, knowledge=knowledge, where=keep
            )
          )
          for knowledge in ("blind", "adaptive")
        )
        cells.append(" / ".join(map(_median, tops)))
      rows.append((name, cells))
    found = [
      [a for a in results.attacks if a["dataset"] == dataset and keep(a)]
      for _, keep in where
    ]
    beside = [
      ("best guess for each image", [_guess(lines) for lines in found]),
      ("images", [_images(lines) for lines in found]),
      ("images in an update", [_update_sizes(lines) for lines in found]),
    ]
    late = any(a["weights"] != "initial" for lines in found for a in lines)
    words = [words for words, _ in where]
    yield BySetting(dataset, words, rows, beside, late)


def _guess(lines: Sequence[evidence.Line]) -> str:
  """Median over the images of what the best guess without an attack scores."""
  known = {
    a["image"]: a["guess_psnr_db"]
    for a in lines
    if a.get("guess_psnr_db") is not None
  }
  return f"{np.median(list(known.values())):.1f}" if known else tables.MISSING


def _images(lines: Sequence[evidence.Line]) -> str:
  return f"{len({a['image'] for a in lines}):,}"


def _update_sizes(lines: Sequence[evidence.Line]) -> str:
  sizes = {a["local_steps"] * a["batch_size"] for a in lines}
  low, high = min(sizes), max(sizes)
  return f"{low}" if low == high else f"{low} to {high}"


def costs_markdown(study: Study) -> str:
  """What each defence costs and what that buys, a table a data set.

  Empty for a study without costs.
  """
  lines: list[str] = []
  for paid in costs_beside(study, by_dataset(study)):
    names = costs.HEADINGS
    lines += [
      *([""] if lines else []),
      f"| {paid.dataset} | Accuracy, % | {names.uplink} | {names.downlink} |"
      f" {names.train} | {names.send} | {names.server} | {names.keys} | ε |"
      " Strongest attack, dB |",
      "| :-- | --: | --: | --: | --: | --: | --: | :-- | :-- | --: |",
    ]
    lines += [
      f"| {c.defense} | {row.accuracy} | {c.uplink} | {c.downlink} |"
      f" {c.train} | {c.send} | {c.server} | {c.keys} | {row.epsilon} |"
      f" {row.strongest} |"
      for c, row in paid.rows
    ]
  return "\n".join(lines) + "\n" * bool(lines)


def claims_markdown(study: Study) -> str:
  """The verdicts alone."""
  judged = claims.judge(study.results, [ablation.mixing_helps])
  lines = ["| Claim | Verdict | Figure |", "| :-- | :-- | --: |"]
  lines += [
    f"| ({c.key}) {c.statement} | {c.verdict} | {figure(c)} |" for c in judged
  ]
  return "\n".join(lines) + "\n"


def _top_name(results: evidence.Results, dataset: str, defense: str) -> str:
  top = evidence.strongest(evidence.lines(results, dataset, defense))
  if top is None:
    return results.unreadable.get(defense, "not attacked")
  return tables.attack_name(top.attack, top.knowledge)


def figure(claim: claims.Claim) -> str:
  """A claim's figure with its interval and unit."""
  if claim.value is None:
    return tables.MISSING
  if claim.unit == "rate":
    text = f"{100 * claim.value:.0f}% of images"
    if claim.low is not None and claim.high is not None:
      text += f" ({100 * claim.low:.0f} to {100 * claim.high:.0f}%)"
    return text
  digits = 0 if claim.unit.startswith("ratios") else 2
  digits = 1 if claim.unit in ("points", "dB") else digits
  text = f"{tables.fixed(claim.value, digits)} {claim.unit}"
  if claim.low is not None and claim.high is not None:
    low, high = (
      tables.fixed(end, max(digits, 1)) for end in (claim.low, claim.high)
    )
    text += f" ({low} to {high})"
  return text.replace("-", tables.MINUS)


def by_dataset(study: Study) -> Iterator[Table]:
  """What every defence came to on each data set."""
  results = study.results
  points = frontier.points(results)
  looks = style.styles(evidence.defenses(results))
  for dataset in evidence.datasets(results):
    rows = []
    for p in (p for p in points if p.dataset == dataset):
      pair = evidence.accuracy_difference(results, dataset, p.defense, "none")
      runs = evidence.accuracies(results, dataset, p.defense).values()
      float32 = next(
        (line["uplink_bytes_per_client_float32"] for line in runs), None
      )
      top = p.strongest
      untried = results.unreadable.get(p.defense, "not tried")
      rows.append(
        Row(
          defense=p.defense,
          color=looks[p.defense].color,
          accuracy=_accuracy(p),
          difference=""
          if pair is None or p.defense == "none"
          else interval(pair[0], "points"),
          uplink=tables.MISSING
          if p.uplink_bytes is None
          else f"{p.uplink_bytes:,.0f}",
          ratio=tables.ratio(p.uplink_bytes, float32),
          epsilon=tables.epsilon(
            {
              "epsilon": p.epsilon,
              **next((_proof(line) for line in runs), {}),
            }
          ),
          blind=_median(p.blind),
          blind_attack=p.blind.attack if p.blind else untried,
          adaptive=_median(p.adaptive),
          adaptive_attack=p.adaptive.attack if p.adaptive else untried,
          strongest=_median(top)
          if top
          else results.unreadable.get(p.defense, tables.MISSING),
          success=f"{top.rate.successes} of {top.rate.trials}"
          if top
          else tables.MISSING,
          interval=findings.interval(top.rate) if top else "",
          pareto="Pareto set" if p.pareto else "",
        )
      )
    references = tables.reference_rows(
      {"references": results.references.get(dataset, {})}
    )
    yield Table(dataset, rows, references)


def costs_beside(study: Study, rows: Iterable[Table]) -> Iterator[Costs]:
  """The costs of each data set that has any, beside the other columns."""
  for table in rows:
    found = {row.defense: row for row in table.rows}
    lines = [
      line
      for line in study.results.costs
      if line["dataset"] == table.dataset and line["defense"] in found
    ]
    if lines:
      pairs = [(row, found[row.defense]) for row in costs.rows(lines)]
      yield Costs(table.dataset, pairs)


def _proof(line: evidence.Line) -> dict[str, Any]:
  return {k: line.get(k) for k in ("epsilon_model", "epsilon_unit")}


def _accuracy(p: frontier.Point) -> str:
  if p.accuracy is None:
    return tables.MISSING
  text = f"{p.accuracy:.1f}"
  return text if p.deviation is None else f"{text} ± {p.deviation:.1f}"


def _median(top: evidence.Strongest | None) -> str:
  return tables.MISSING if top is None else f"{top.median.value:.1f}"


def interval(value: evidence.Interval, unit: str) -> str:
  text = f"{value.value:+.1f} {unit}".rstrip()
  if value.low is not None and value.high is not None:
    text += f" ({value.low:.1f} to {value.high:.1f})"
  return text.replace("-", tables.MINUS)
