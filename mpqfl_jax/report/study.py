"""The page of a study: the answer, the claims, the frontier, the images."""

from collections.abc import Iterable, Iterator, Sequence
import json
import pathlib
from typing import Any, NamedTuple

from mpqfl_jax import errors
from mpqfl_jax.report import (
  claims,
  costs,
  evidence,
  figures,
  findings,
  frontier,
  grid,
  page,
  records,
  style,
  tables,
)

# Images of a data set on the wall.
_SHOWN = 8
_BADGES = {
  claims.HOLDS: "Holds",
  claims.FAILS: "Fails",
  claims.OPEN: "Open",
}


class _Row(NamedTuple):
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


class _Table(NamedTuple):
  dataset: str
  rows: list[_Row]
  references: list[tuple[str, str, str]]


class _Costs(NamedTuple):
  """What the defences of a data set cost, and what that buys."""

  dataset: str
  rows: list[tuple[costs.Row, _Row]]


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
  for table in _tables(study):
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
    f" {g.own:.1f} | {g.other:.1f} | {_interval(g.gain, '')} | {g.images} |"
    for g in frontier.gains(study.results)
  ]
  return "\n".join(lines) + "\n"


def settings_markdown(study: Study) -> str:
  """The strongest attack on each defence, blind and adaptive, by setting."""
  results = study.results
  lines: list[str] = []
  for dataset in evidence.datasets(results):
    where = list(frontier.settings(results, dataset))
    lines += [
      *([""] if lines else []),
      f"| {dataset}: blind / adaptive, dB |"
      + "".join(f" {words} |" for words, _ in where),
      "| :-- |" + " --: |" * len(where),
    ]
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
      lines.append(f"| {name} | {' | '.join(cells)} |")
  return "\n".join(lines) + "\n"


def costs_markdown(study: Study) -> str:
  """What each defence costs and what that buys, a table a data set.

  Empty for a study without costs.
  """
  lines: list[str] = []
  for paid in _costs(study, _tables(study)):
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
  judged = claims.judge(study.results, [frontier.mixing_helps])
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


def write(run_dir: str | pathlib.Path) -> pathlib.Path:
  """Draws a study's figures and writes its page.

  Args:
    run_dir: the folder of a finished study.

  Returns:
    Path of `report.html`; the figures lie beside it in `figures/`.

  Raises:
    UserError: the folder holds no finished study.
  """
  study = read(run_dir)
  folder = study.folder / "figures"
  folder.mkdir(exist_ok=True)
  judged = claims.judge(study.results, [frontier.mixing_helps])
  headline, *more = _answer(study, judged)
  rows = list(_tables(study))
  return page.write(
    study.folder,
    "study.html",
    subtitle=_subtitle(study),
    headline=headline,
    more=more,
    claims=judged,
    badges=_BADGES,
    figure_of=figure,
    frontier=frontier.draw(study.results, folder),
    tables=rows,
    costs=list(_costs(study, rows)),
    cost_headings=costs.HEADINGS,
    gains=[
      (g, f"{g.own:.1f}", f"{g.other:.1f}", _interval(g.gain, "dB"))
      for g in frontier.gains(study.results)
    ],
    ablation=[
      (a, *_ablation_text(a)) for a in frontier.ablation(study.results)
    ],
    walls=list(_walls(study, folder)),
    encryption=study.results.encryption or [],
    regimes=sorted({a["knowledge"] for a in study.results.attacks}),
    settings=list(_settings(study)),
    thresholds={
      "leaks": f"{100 * claims.LEAKS_FROM:.0f}%",
      "stopped": f"{100 * claims.STOPPED_TO:.0f}%",
      "shows": f"{claims.SHOWS_DB:g} dB",
      "points": f"{claims.MINIMAL_POINTS:g}",
      "seeds": claims.MIN_SEEDS,
      "margin": f"{frontier.MARGIN_DB:g} dB",
    },
    commits=study.summary.get("commits", []),
    config=list(tables.flat(study.config)),
  )


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


def _answer(study: Study, judged: Sequence[claims.Claim]) -> list[str]:
  """What a reader takes home, the central claim first."""
  by_key = {c.key: c for c in judged}
  counts = {
    verdict: [f"({c.key})" for c in judged if c.verdict == verdict]
    for verdict in _BADGES
  }
  mixed = claims.main_mixed(study.results) or "the mixed scheme"
  adaptive = by_key["c"].verdict
  first = {
    claims.FAILS: (
      "An attacker who knows the codec reads images out of what the mixed"
      f" scheme ({mixed}) sends."
    ),
    claims.HOLDS: (
      f"{mixed} stopped the attacks tried, by an attacker who knows the codec"
      " too. Others may still succeed."
    ),
    claims.OPEN: (
      f"Whether {mixed} stops an attacker who knows the codec is open."
    ),
  }[adaptive]
  words = (
    (claims.HOLDS, "held up"),
    (claims.FAILS, "failed"),
    (claims.OPEN, "open for want of evidence"),
  )
  out = [
    first,
    f"Of {len(judged)} claims, "
    + ", ".join(
      f"{len(counts[v])} {text}"
      + (f" {', '.join(counts[v])}" if counts[v] else "")
      for v, text in words
    )
    + ".",
  ]
  out += [
    f"({c.key}) {_BADGES[c.verdict]}: {c.statement.removesuffix('.')}:"
    f" {figure(c)}."
    for c in judged
    if c.key in "acdh" and c.value is not None
  ]
  best = [p for p in frontier.points(study.results) if p.pareto]
  looks = style.styles(evidence.defenses(study.results))
  for dataset in dict.fromkeys(p.dataset for p in best):
    mine = [looks[p.defense].label for p in best if p.dataset == dataset]
    out.append(
      f"On {dataset}, no other defence is at least as good in privacy, accuracy"
      f" and bytes as: {', '.join(mine)}."
    )
  return out


def _subtitle(study: Study) -> str:
  config = study.config
  seeds = len(config["study_seeds"])
  parts = [
    ", ".join(config["study_datasets"]),
    config["model"],
    f"{seeds} seed" + ("" if seeds == 1 else "s"),
    f"{config['num_clients']} clients",
    f"{config['rounds']} rounds",
    f"{study.summary['cells']} runs",
  ]
  return " · ".join(parts)


def _tables(study: Study) -> Iterator[_Table]:
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
        _Row(
          defense=p.defense,
          color=looks[p.defense].color,
          accuracy=_accuracy(p),
          difference=""
          if pair is None or p.defense == "none"
          else _interval(pair[0], "points"),
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
    yield _Table(dataset, rows, references)


def _costs(study: Study, rows: Iterable[_Table]) -> Iterator[_Costs]:
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
      yield _Costs(table.dataset, pairs)


def _proof(line: evidence.Line) -> dict[str, Any]:
  return {k: line.get(k) for k in ("epsilon_model", "epsilon_unit")}


def _accuracy(p: frontier.Point) -> str:
  if p.accuracy is None:
    return tables.MISSING
  text = f"{p.accuracy:.1f}"
  return text if p.deviation is None else f"{text} ± {p.deviation:.1f}"


def _median(top: evidence.Strongest | None) -> str:
  return tables.MISSING if top is None else f"{top.median.value:.1f}"


def _interval(value: evidence.Interval, unit: str) -> str:
  text = f"{value.value:+.1f} {unit}".rstrip()
  if value.low is not None and value.high is not None:
    text += f" ({value.low:.1f} to {value.high:.1f})"
  return text.replace("-", tables.MINUS)


def _ablation_text(a: frontier.Ablation) -> tuple[str, str, str]:
  gap = (
    tables.MISSING
    if a.accuracy_gap is None
    else _interval(a.accuracy_gap, "points")
  )
  gain = tables.MISSING if a.gain is None else _interval(a.gain, "dB")
  size = tables.MISSING if a.uplink_bytes is None else f"{a.uplink_bytes:,.0f}"
  return size, gap, gain


def _settings(study: Study) -> Iterator[tuple[str, str, str, str]]:
  """(data set, attack, knowledge, its assumptions) of every attack."""
  attacks = study.results.attacks
  key = ("dataset", "attack", "knowledge")
  for place in dict.fromkeys(tuple(a[k] for k in key) for a in attacks):
    mine = [a for a in attacks if tuple(a[k] for k in key) == place]
    yield *place, "; ".join(grid.describe(mine)[1:])


def _walls(study: Study, folder: pathlib.Path) -> Iterator[figures.Figure]:
  """Originals and reconstructions, the strongest attack of each knowledge.

  The attack is the one that is strongest on most defences.
  """
  for old in folder.glob("wall_*.png"):
    old.unlink()
  results = study.results
  looks = style.styles(evidence.defenses(results))
  for dataset in evidence.datasets(results):
    where = evidence.base_setting(results, dataset)
    for knowledge in ("blind", "adaptive"):
      tops = [
        top.attack
        for name in looks
        if (
          top := evidence.strongest(
            evidence.lines(results, dataset, name, knowledge=knowledge)
          )
        )
      ]
      if not tops:
        continue
      attack = max(dict.fromkeys(tops), key=tops.count)
      lines = [
        a
        for a in results.attacks
        if a["dataset"] == dataset
        and evidence.setting(a) == where
        and (a["attack"], a["knowledge"]) == (attack, knowledge)
      ]
      sets = _reconstructions(study.folder, {a["cell"] for a in lines}, looks)
      # A cell with this attack alone gives it a short name.
      names = (attack, style.family(attack))
      sets = [
        s._replace(attack=attack)
        for s in sets
        if s.attack in names and s.knowledge == knowledge
      ]
      run = records.Run(study.folder, study.config, {}, [], lines, sets)
      for number, group in enumerate(grid.groups(sets)):
        drawn = grid.draw(group, looks, grid.settings(run, group))
        path = folder / f"wall_{dataset}_{knowledge}_{number}.png"
        drawn.figure.savefig(path)
        yield figures.Figure(
          path, drawn.title, drawn.alt, drawn.caption, drawn.width
        )


def _reconstructions(
  folder: pathlib.Path, cells: set[str], looks: dict[str, style.Style]
) -> list[records.Reconstructions]:
  found = [
    records.reconstructions(path)
    for cell in sorted(cells)
    for path in sorted((folder / "cells" / cell).glob("reconstructions/*.npz"))
  ]
  names = list(looks)
  found.sort(key=lambda s: names.index(s.defense))
  return [
    s._replace(
      original=s.original[:_SHOWN],
      reconstruction=s.reconstruction[:_SHOWN],
      label=s.label[:_SHOWN],
      recovered_label=s.recovered_label[:_SHOWN],
      client=s.client[:_SHOWN],
    )
    for s in found
  ]
