"""The page of a study: the answer, the claims, the frontier, the images."""

from collections.abc import Iterator, Sequence
import pathlib
from typing import Any

from mpqfl_jax.report import (
  ablation,
  claims,
  costs,
  evidence,
  figures,
  frontier,
  grid,
  key_growth,
  page,
  records,
  study_tables,
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


def write(run_dir: str | pathlib.Path) -> pathlib.Path:
  """Draws a study's figures and writes its page.

  Args:
    run_dir: the folder of a finished study.

  Returns:
    Path of `report.html`; the figures lie beside it in `figures/`.

  Raises:
    UserError: the folder holds no finished study.
  """
  study = study_tables.read(run_dir)
  folder = study.folder / "figures"
  folder.mkdir(exist_ok=True)
  judged = claims.judge(study.results, [ablation.mixing_helps])
  headline, *more = _answer(study, judged)
  rows = list(study_tables.by_dataset(study))
  return page.write(
    study.folder,
    "study.html",
    subtitle=_subtitle(study),
    headline=headline,
    more=more,
    claims=judged,
    badges=_BADGES,
    figure_of=study_tables.figure,
    frontier=frontier.draw(study.results, folder),
    tables=rows,
    costs=list(study_tables.costs_beside(study, rows)),
    cost_headings=costs.HEADINGS,
    gains=[
      (g, f"{g.own:.1f}", f"{g.other:.1f}", study_tables.interval(g.gain, "dB"))
      for g in ablation.gains(study.results)
    ],
    ablation=[(a, *_ablation_text(a)) for a in ablation.compare(study.results)],
    # With one setting alone it would repeat the tables of the defences.
    by_setting=[
      t for t in study_tables.by_setting(study) if len(t.settings) > 1
    ],
    walls=list(_walls(study, folder)),
    curves=list(_curves(study, folder)),
    encryption=study.results.encryption or [],
    keys=key_growth.draw(study.results.encryption, folder)
    if study.results.encryption
    else None,
    regimes=sorted({a["knowledge"] for a in study.results.attacks}),
    settings=list(_settings(study)),
    thresholds={
      "leaks": f"{100 * claims.LEAKS_FROM:.0f}%",
      "stopped": f"{100 * claims.STOPPED_TO:.0f}%",
      "shows": f"{claims.SHOWS_DB:g} dB",
      "points": f"{claims.MINIMAL_POINTS:g}",
      "seeds": claims.MIN_SEEDS,
      "margin": f"{ablation.MARGIN_DB:g} dB",
    },
    commits=study.summary.get("commits", []),
    config=list(tables.flat(study.config)),
  )


def _answer(
  study: study_tables.Study, judged: Sequence[claims.Claim]
) -> list[str]:
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
    f" {study_tables.figure(c)}."
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


def _subtitle(study: study_tables.Study) -> str:
  config = study.config
  seeds = len(config["study_seeds"])
  parts = [
    ", ".join(config["study_datasets"]),
    config["model"],
    f"{seeds} seed" + ("" if seeds == 1 else "s"),
    f"{config['num_clients']:,} clients{_beside(config)}",
    f"{config['rounds']} rounds",
    f"{study.summary['cells']} runs",
  ]
  return " · ".join(parts)


def _beside(config: dict[str, Any]) -> str:
  """The other numbers of clients, whose training was attacked."""
  others = [f"{n:,}" for n in config.get("study_clients", ())]
  return f" ({', '.join(others)} attacked as well)" if others else ""


def _ablation_text(a: ablation.Ablation) -> tuple[str, str, str]:
  gap = (
    tables.MISSING
    if a.accuracy_gap is None
    else study_tables.interval(a.accuracy_gap, "points")
  )
  gain = (
    tables.MISSING if a.gain is None else study_tables.interval(a.gain, "dB")
  )
  size = tables.MISSING if a.uplink_bytes is None else f"{a.uplink_bytes:,.0f}"
  return size, gap, gain


def _settings(study: study_tables.Study) -> Iterator[tuple[str, str, str, str]]:
  """(data set, attack, knowledge, its assumptions) of every attack."""
  attacks = study.results.attacks
  key = ("dataset", "attack", "knowledge")
  for place in dict.fromkeys(tuple(a[k] for k in key) for a in attacks):
    mine = [a for a in attacks if tuple(a[k] for k in key) == place]
    yield *place, "; ".join(grid.describe(mine)[1:])


def _curves(
  study: study_tables.Study, folder: pathlib.Path
) -> Iterator[figures.Figure]:
  """Accuracy over the rounds: a figure a data set, if tested on the way."""
  results = study.results
  looks = style.styles(evidence.defenses(results))
  for dataset in evidence.datasets(results):
    lines = {
      name: [(number, 100 * value) for number, value in points]
      for name in looks
      if len(points := evidence.curve(results, dataset, name)) > 1
    }
    if lines:
      yield figures.draw_accuracy(
        lines,
        looks,
        folder / f"accuracy_{dataset}.png",
        dataset,
        "Mean over the seeds. Under a seed all defences start from the same"
        " weights and see the same cohorts.",
      )


def _walls(
  study: study_tables.Study, folder: pathlib.Path
) -> Iterator[figures.Figure]:
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
