"""What the cells of a study measured, in the files that scripts rely on."""

from collections.abc import Iterator, Sequence
import json
import pathlib
from typing import Any

import numpy as np

from experiments import adversary, config, folder, summary
from experiments.study_grid import Cell
from mpqfl_jax import metrics
from mpqfl_jax.report import ablation, claims, evidence, frontier


def collect(
  cells: Sequence[Cell], encryption: list[dict[str, Any]] | None = None
) -> evidence.Results:
  """Reads what finished cells measured.

  Args:
    cells: of the grid, all of them finished.
    encryption: costs that were measured elsewhere.
  """
  training: list[dict[str, Any]] = []
  attacks: list[dict[str, Any]] = []
  unreadable: dict[str, str] = {}
  paid: list[dict[str, Any]] = []
  references: dict[str, dict[str, Any]] = {}
  hashes: dict[str, dict[str, str]] = {}
  # A cell with one attack gives it a short name: here are the others.
  specs = {spec for cell in cells for spec in cell.config.attack}
  for cell in cells:
    values = cell.config
    found = json.loads((cell.folder / "summary.json").read_text())
    if values.task == "attack":
      references.setdefault(values.dataset, found["references"])
    elif values.task == "costs":
      paid += folder.read_lines(cell.folder / "costs.jsonl")
    elif not (cell.twin or cell.aside):
      rounds = folder.read_lines(cell.folder / "metrics.jsonl")
      training += _training_lines(values, found, rounds)
    own = values.task == "train" and not cell.aside
    if own and values.defense == ("none",):
      sha = found["final_params_sha256"]
      key = "unwatched" if cell.twin else "watched" if values.attack else ""
      hashes.setdefault(values.dataset, {})[key] = sha
    path = cell.folder / "attacks.jsonl"
    named = {}
    if len(values.attack) == 1:
      named["attack"] = adversary.attack_label(specs, values.attack[0])
    if path.is_file():
      for line in folder.read_lines(path):
        if line.get("reason") is not None:
          unreadable[line["defense"]] = line["reason"]
          continue
        where: dict[str, Any] = {"seed": values.seed, "cell": cell.folder.name}
        if values.task == "train":
          where["num_clients"] = values.num_clients
        attacks.append({**line, **named, **where})
  twins = [
    {"dataset": name, **{k: v for k, v in both.items() if k}}
    for name, both in hashes.items()
    if {"watched", "unwatched"} <= both.keys()
  ]
  return evidence.Results(
    training, attacks, references, twins, encryption, paid, unreadable
  )


def _training_lines(
  values: config.Config,
  found: dict[str, Any],
  rounds: Sequence[dict[str, Any]],
) -> Iterator[dict[str, Any]]:
  for spec, entry in found["defenses"].items():
    yield {
      "dataset": values.dataset,
      "seed": values.seed,
      "defense": spec,
      **{
        name: entry.get(name)
        for name in (
          *("test_accuracy", "uplink_bytes_per_client", "epsilon", "delta"),
          *("epsilon_model", "epsilon_unit"),
          *("final_params_sha256", "seconds", "compile_seconds"),
        )
      },
      "uplink_bytes_per_client_float32": found[
        "uplink_bytes_per_client_float32"
      ],
      "accuracies": [
        [line["round"], line["test_accuracy"]]
        for line in rounds
        if line["defense"] == spec and line["test_accuracy"] is not None
      ],
    }


def write(
  run_dir: pathlib.Path, values: config.Config, results: evidence.Results
) -> dict[str, Any]:
  """Writes the study's tables.

  Args:
    run_dir: gets `training.jsonl`, `attacks.jsonl`, `costs.jsonl`,
      `evidence.json` and `study.jsonl`.
    values: the study's config.
    results: of all cells.

  Returns:
    What `summary.json` holds, totals aside.
  """
  for name in ("training", "attacks", "costs"):
    lines = getattr(results, name)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    folder.write_atomically(run_dir / f"{name}.jsonl", text.encode())
  folder.write_json(
    run_dir / "evidence.json",
    {
      name: getattr(results, name)
      for name in ("references", "twins", "encryption", "unreadable")
    },
  )
  points = [_point(p, results) for p in frontier.points(results)]
  text = "".join(json.dumps(line) + "\n" for line in points)
  folder.write_atomically(run_dir / "study.jsonl", text.encode())
  judged = claims.judge(results, [ablation.mixing_helps])
  by_set = {
    name: _defenses(results, values, [name]) for name in values.study_datasets
  }
  everything = _defenses(results, values, list(values.study_datasets))
  first = next(iter(everything.values()))
  float32 = [
    line["uplink_bytes_per_client_float32"] for line in results.training
  ]
  return {
    "task": values.task,
    "test_accuracy": first["test_accuracy"],
    "rounds": values.rounds,
    "final_params_sha256": first["final_params_sha256"],
    "uplink_bytes_per_client": first["uplink_bytes_per_client"],
    "uplink_bytes_per_client_float32": float(np.mean(float32)),
    "defenses": everything,
    "references": _references(results),
    "datasets": {
      name: {
        "defenses": by_set[name],
        "references": results.references.get(name, {}),
      }
      for name in by_set
    },
    "claims": [c._asdict() | {"words": c.words} for c in judged],
    "ablation": [_plain(a._asdict()) for a in ablation.compare(results)],
    "frontier": points,
  }


def _point(p: frontier.Point, results: evidence.Results) -> dict[str, Any]:
  """A line of `study.jsonl`."""

  def top(found: evidence.Strongest | None) -> dict[str, Any] | None:
    if found is None:
      return None
    return {
      "attack": found.attack,
      "knowledge": found.knowledge,
      "images": found.rate.trials,
      "psnr_db_median": found.median.value,
      "psnr_db_median_low": found.median.low,
      "psnr_db_median_high": found.median.high,
      "success_rate": found.rate.rate,
      "success_rate_low": found.rate.low,
      "success_rate_high": found.rate.high,
    }

  tops = {
    name: top(getattr(p, name)) for name in ("blind", "adaptive", "strongest")
  }
  return {
    **p._asdict(),
    **tops,
    "references": results.references.get(p.dataset, {}),
  }


def _plain(value: Any) -> Any:
  """Named tuples as dictionaries, all the way down."""
  if hasattr(value, "_asdict"):
    value = value._asdict()
  if isinstance(value, dict):
    return {name: _plain(inner) for name, inner in value.items()}
  return value


def _defenses(
  results: evidence.Results, values: config.Config, names: list[str]
) -> dict[str, dict[str, Any]]:
  """The entries of `summary.json`, over some data sets and all seeds."""
  out = {}
  for spec in values.defense:
    runs = [
      line
      for line in results.training
      if line["defense"] == spec and line["dataset"] in names
    ]
    attacks: dict[str, dict[str, Any]] = {}
    mine = [
      line for name in names for line in evidence.lines(results, name, spec)
    ]
    for key in dict.fromkeys((a["attack"], a["knowledge"]) for a in mine):
      found = [a for a in mine if (a["attack"], a["knowledge"]) == key]
      attacks.setdefault(key[0], {})[key[1]] = metrics.summarize(
        evidence.psnr(found), np.array([a["ssim"] for a in found])
      )
    epsilons = [r["epsilon"] for r in runs if r["epsilon"] is not None]
    out[spec] = {
      "test_accuracy": float(np.mean([r["test_accuracy"] for r in runs])),
      "final_params_sha256": runs[0]["final_params_sha256"],
      "uplink_bytes_per_client": float(
        np.mean([r["uplink_bytes_per_client"] for r in runs])
      ),
      "epsilon": max(epsilons, default=None),
      "delta": runs[0]["delta"],
      "attacks": attacks,
      "unreadable": results.unreadable.get(spec),
    }
  return out


def _references(results: evidence.Results) -> dict[str, dict[str, float]]:
  """Medians over the data sets of what guesses score on each."""
  found = list(results.references.values())
  return {
    name: {
      key: float(np.median([r[name][key] for r in found]))
      for key in ("psnr_db_median", "ssim_median")
    }
    for name in (found[0] if found else {})
  }


def totals(cells: Sequence[Cell], seconds: float) -> dict[str, Any]:
  """What all cells took together, for `summary.json`.

  Args:
    cells: of the grid, all of them finished.
    seconds: since the study was started, which may have found some of them.
  """
  found = [
    json.loads((cell.folder / "summary.json").read_text()) for cell in cells
  ]
  commits = {
    json.loads((cell.folder / "config.json").read_text())["commit"]
    for cell in cells
  }
  return {
    "cells": len(cells),
    "commits": sorted(str(commit) for commit in commits),
    "seconds": seconds,
    "cell_seconds": sum(each["seconds"] for each in found),
    "compile_seconds": sum(each["compile_seconds"] for each in found),
    "peak_rss_mb": summary.peak_rss_mb(),
  }
