"""One self-contained page for a run: `report.html`."""

from collections.abc import Iterator
import pathlib
from typing import Any, NamedTuple

import numpy as np

from mpqfl_jax.report import (
  costs,
  figures,
  findings,
  grid,
  leakage,
  page,
  records,
  scaling,
  study,
  style,
  tables,
)


class _Line(NamedTuple):
  row: tables.Row
  values: dict[str, str]
  family: str
  parameters: str
  attack: str
  knowledge: str
  color: str
  verdict: findings.Verdict
  counted: str
  interval: str


class _AttackRow(NamedTuple):
  family: str
  parameters: str
  attack: str
  knowledge: str
  images: int
  success: str
  interval: str
  psnr: str
  psnr_max: str
  ssim: str
  labels: str
  reidentified: str
  seconds: str


class _Setting(NamedTuple):
  attack: str
  knowledge: str
  rounds: str
  text: str


def write(run_dir: str | pathlib.Path) -> pathlib.Path:
  """Draws a run's figures and writes its page.

  Reads nothing but the run's own folder.

  Args:
    run_dir: the folder of a finished run.

  Returns:
    Path of `report.html`; the figures lie beside it in `figures/` and are
    embedded in it.

  Raises:
    UserError: the folder holds no finished run.
  """
  task = records.task(run_dir)
  own = {
    "study": study.write,
    "scaling": scaling.write,
    "leakage": leakage.write,
    "costs": costs.write,
  }
  if task in own:
    return own[task](run_dir)
  run = records.read(run_dir)
  table = tables.rows(run.summary)
  headline, *more = findings.headline(run)
  return page.write(
    run.folder,
    "run.html",
    subtitle=_subtitle(run),
    headline=headline,
    more=more,
    columns=tables.used_columns(table),
    headings=tables.HEADINGS._asdict(),
    lines=list(_lines(run, table)),
    references=tables.reference_rows(run.summary),
    missing=tables.MISSING,
    figures=figures.write(run),
    attack_rows=list(_attack_rows(run)),
    settings=list(_settings(run)),
    regimes=sorted({line["knowledge"] for line in run.attacks}),
    families={style.family(name) for name in run.summary["defenses"]},
    config=list(tables.flat(run.config)),
    totals=list(_totals(run.summary)),
  )


def _lines(run: records.Run, table: list[tables.Row]) -> Iterator[_Line]:
  known = style.styles(run.summary["defenses"])
  for row, verdict in zip(table, findings.verdicts(run), strict=True):
    top = records.strongest(run.summary["defenses"][row.defense])
    counted = interval = ""
    attack, knowledge = row.attack, ""
    if top is not None:
      attack, knowledge = top.attack, top.regime
      rate = findings.attack_rate(run, row.defense, top)
      counted = f"{rate.successes} of {rate.trials}"
      interval = findings.interval(rate)
    base = style.family(row.defense)
    yield _Line(
      row=row,
      values=row._asdict(),
      family=base,
      parameters=row.defense[len(base) :],
      attack=attack,
      knowledge=knowledge,
      color=known[row.defense].color,
      verdict=verdict,
      counted=counted,
      interval=interval,
    )


def _attack_rows(run: records.Run) -> Iterator[_AttackRow]:
  for defense, entry in run.summary["defenses"].items():
    for cell in records.cells(entry):
      lines = findings.attack_lines(run, defense, cell)
      success, interval = cell.reason or "", ""
      if cell.reason is None:
        rate = findings.attack_rate(run, defense, cell)
        success = f"{rate.successes} of {rate.trials}"
        interval = findings.interval(rate)
      inferred = [line for line in lines if not line.get("labels_known")]
      seconds = _values(lines, "seconds")
      yield _AttackRow(
        family=style.family(defense),
        parameters=defense[len(style.family(defense)) :],
        attack=cell.attack,
        knowledge=cell.regime,
        images=len(lines),
        success=success,
        interval=interval,
        psnr=tables.fixed(cell.psnr_db_median, 1),
        psnr_max=tables.fixed(cell.psnr_db_max, 1),
        ssim=tables.fixed(cell.ssim_median, 2),
        labels=_share(inferred, "label_correct") if inferred else "known",
        reidentified=_share(lines, "reidentified"),
        seconds=f"{np.median(seconds):.2g}" if seconds else tables.MISSING,
      )


def _settings(run: records.Run) -> Iterator[_Setting]:
  keys = [(line["attack"], line["knowledge"]) for line in run.attacks]
  for attack, knowledge in dict.fromkeys(keys):
    lines = [
      line
      for line, key in zip(run.attacks, keys, strict=True)
      if key == (attack, knowledge)
    ]
    rounds = sorted(set(_values(lines, "round")))
    yield _Setting(
      attack,
      knowledge,
      ", ".join(str(r) for r in rounds if r) or tables.MISSING,
      "; ".join(grid.describe(lines)),
    )


def _subtitle(run: records.Run) -> str:
  """The setting of the run in one line, of what the config holds."""
  phrases = (
    ("dataset", "{}"),
    ("model", "{}"),
    ("num_clients", "{} clients"),
    ("cohort_size", "{} a round"),
    ("rounds", "{} rounds"),
    ("batch_size", "batches of {}"),
    ("seed", "seed {}"),
  )
  training = {"num_clients", "cohort_size", "rounds"}
  found = []
  for name, phrase in phrases:
    value = records.setting(run.config, name)
    if value is not None and (run.rounds or name not in training):
      found.append(phrase.format(value))
  return " · ".join(found)


def _totals(summary: dict[str, Any]) -> Iterator[tuple[str, str]]:
  for name, label, unit in (
    ("seconds", "Run time", "s"),
    ("compile_seconds", "of which compiling", "s"),
    ("peak_rss_mb", "Peak memory", "MB"),
  ):
    if summary.get(name) is not None:
      yield label, f"{summary[name]:,.1f} {unit}"
  for name, entry in summary["defenses"].items():
    if entry.get("final_params_sha256"):
      yield f"SHA-256 of final parameters, {name}", entry["final_params_sha256"]


def _values(lines: list[dict[str, Any]], name: str) -> list[Any]:
  return [line[name] for line in lines if line.get(name) is not None]


def _share(lines: list[dict[str, Any]], name: str) -> str:
  values = _values(lines, name)
  return f"{sum(values)} of {len(values)}" if values else tables.MISSING
