"""The task `study`: a grid of training runs and attacks, and what it shows.

A cell of the grid is an ordinary run in a folder of its own, named by the hash
of its config. A cell that is there is not run again: an interrupted study goes
on with `--resume`, and one whose grid has grown runs what is new.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import functools
import gc
import hashlib
import json
import pathlib
import shutil
import sys
import time
from typing import Any, NamedTuple
import warnings

import jax
from jax.experimental.compilation_cache import compilation_cache
import numpy as np

from experiments import (
  adversary,
  attack,
  config,
  costs,
  folder,
  progress,
  setting,
  summary,
  workers,
)
from mpqfl_jax import datasets, errors, metrics
from mpqfl_jax.report import claims, evidence, frontier

# What has no influence on the results of a cell.
_FREE = (
  *("output_dir", "overwrite", "resume", "data_dir", "checkpoint_every"),
  # `study_clients` is in a cell's own `num_clients`.
  *("dry_run", "writers", "study_processes", "study_clients"),
  *("coordinator_address", "num_processes", "process_id"),
)
# What the task `attack` never reads.
_TRAINING = (
  *("partition", "size_sigma", "dirichlet_alpha", "num_clients", "cohort_size"),
  *("rounds", "local_epochs", "server_optimizer", "server_lr", "dropout"),
  *("server_lr_schedule", "aggregator", "eval_every", "attack_rounds"),
  "attack_clients",
)
_ATTACKS = (
  *("attack", "attack_knowledge", "attack_rounds", "attack_clients"),
  *("attack_images", "attack_restarts", "labels_known"),
)
_STUDY = (
  *("study_datasets", "study_seeds", "study_batches", "study_local_steps"),
  *("study_clients", "study_encryption", "study_processes"),
)
# What the grid is made of: it may grow from one start to the next.
_GRID = (*_STUDY, "defense", "attack", "attack_knowledge")


class Cell(NamedTuple):
  """One run of the grid.

  Attributes:
    config: of the run.
    name: for the progress bar.
    twin: whether it repeats an attacked run without the adversary.
    aside: whether it trains another number of clients than the study's, to be
      attacked.
  """

  config: config.Config
  name: str
  twin: bool = False
  aside: bool = False

  @property
  def folder(self) -> pathlib.Path:
    return pathlib.Path(self.config.output_dir)


def grid(values: config.Config) -> list[Cell]:
  """All cells, those of one data set after another.

  Training is attacked under the first seed alone, in the rounds of
  `--attack_rounds` after the first: the weights of the first round are those
  that the attack cells take.
  """
  late = tuple(r for r in values.attack_rounds if r > 1)
  watched = bool(values.attack and late)
  out = []
  for dataset in values.study_datasets:
    here = dataclasses.replace(values, dataset=dataset)
    for seed in values.study_seeds:
      for spec in values.defense:
        name = f"{dataset}, seed {seed}, {spec}"
        plain = _train(here, seed, spec, ())
        attacked = watched and seed == values.study_seeds[0]
        if attacked:
          out.append(Cell(_train(here, seed, spec, late), name))
        else:
          out.append(Cell(plain, name))
        if attacked and spec == "none":
          out.append(Cell(plain, f"{name}, unwatched", twin=True))
    for clients in values.study_clients:
      for spec in values.defense:
        cell = _train(_of(here, clients), here.study_seeds[0], spec, late)
        name = f"{dataset}, {clients:,} clients, {spec}"
        out.append(Cell(cell, name, aside=True))
    for spec in values.attack:
      for steps in values.study_local_steps:
        for batch in values.study_batches:
          for knowledge in values.attack_knowledge:
            out.append(
              Cell(
                _attack(here, spec, knowledge, steps, batch),
                f"{dataset}, {spec}, {knowledge}, {steps} x {batch}",
              )
            )
    out.append(Cell(_costs(here), f"{dataset}, costs"))
  return out


def _train(
  values: config.Config, seed: int, spec: str, rounds: tuple[int, ...]
) -> config.Config:
  cell = dataclasses.replace(
    values, task="train", seed=seed, defense=(spec,), attack_rounds=rounds
  )
  return _place(values, cell, () if rounds else _ATTACKS)


def _of(values: config.Config, clients: int) -> config.Config:
  """The same study with another number of clients."""
  cohort = min(values.cohort_size, clients)
  return dataclasses.replace(values, num_clients=clients, cohort_size=cohort)


def _costs(values: config.Config) -> config.Config:
  cell = dataclasses.replace(values, task="costs", seed=values.study_seeds[0])
  return _place(values, cell, _ATTACKS)


def _attack(
  values: config.Config, spec: str, knowledge: str, steps: int, batch: int
) -> config.Config:
  cell = dataclasses.replace(
    values,
    task="attack",
    seed=values.study_seeds[0],
    attack=(spec,),
    attack_knowledge=(knowledge,),
    local_steps=steps,
    batch_size=batch,
  )
  return _place(values, cell, _TRAINING)


def _place(
  values: config.Config, cell: config.Config, unused: tuple[str, ...]
) -> config.Config:
  """Sets what the cell does not use to the defaults, and its folder."""
  defaults = dataclasses.asdict(config.make())
  kept = {name: defaults[name] for name in (*unused, *_STUDY)}
  cell = dataclasses.replace(cell, **kept, overwrite=False, resume=True)
  place = pathlib.Path(values.output_dir) / "cells" / cell_hash(cell)
  cell = dataclasses.replace(cell, output_dir=str(place))
  config.check(cell)
  return cell


def cell_hash(cell: config.Config) -> str:
  """16 hexadecimal digits of the SHA-256 of what decides a cell's results."""
  fields = dataclasses.asdict(cell)
  for name in _FREE:
    del fields[name]
  text = json.dumps(fields, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def run(
  values: config.Config, measure: Callable[..., pathlib.Path]
) -> pathlib.Path:
  """Runs every cell that is not there yet, then writes what they show.

  Args:
    values: the study's config.
    measure: (config, data) -> folder: performs one cell.

  Returns:
    The study's folder.

  Raises:
    UserError: a mistake, found before the folder is made.
  """
  begin = time.perf_counter()
  encryption = costs.encryption(values.study_encryption)
  cells = grid(values)
  _check(values, cells)
  run_dir = folder.create(
    values.output_dir,
    {
      **dataclasses.asdict(values),
      "mesh_devices": len(jax.local_devices()[: values.devices]),
      "command": sys.argv[1:],
      **folder.environment(),
    },
    values.overwrite,
    values.resume,
    _GRID,
  )
  todo = [cell for cell in cells if not _done(cell)]
  place = run_dir / "compiled"
  perform = functools.partial(_perform, measure, place)
  with progress.table(cells, todo) as advance, _programs_kept(place):
    for cell in _performed(values, perform, todo):
      advance(cell)
  results = collect(cells, encryption)
  written = write(run_dir, values, results)
  folder.write_json(
    run_dir / "summary.json",
    {**written, **_totals(cells, time.perf_counter() - begin)},
  )
  return run_dir


def _performed(
  values: config.Config, perform: Callable[[Cell], None], cells: list[Cell]
) -> Iterator[Cell]:
  """Runs the cells and yields each when it is done."""
  # Beside others a cell would measure what they leave it.
  timed = [c for c in cells if c.config.task == "costs"]
  others = [c for c in cells if c.config.task != "costs"]
  if values.study_processes > 1 and len(others) > 1:
    devices = len(jax.local_devices()[: values.devices])
    yield from workers.each(perform, others, values.study_processes, devices)
  else:
    timed = cells
  for cell in timed:
    perform(cell)
    yield cell


def _perform(
  measure: Callable[..., pathlib.Path], compiled: pathlib.Path, cell: Cell
) -> None:
  """Runs one cell, in this process or in one of its own."""
  _keep_programs(compiled)
  measure(cell.config, _data(cell.config.dataset, cell.config.data_dir))
  # Programs of hundreds of cells would fill the process's address space; what
  # the next cell shares is in the cache on disk.
  jax.clear_caches()
  gc.collect()


@functools.lru_cache(maxsize=1)
def _data(dataset: str, data_dir: str | None) -> datasets.Dataset:
  return setting.load_data(config.make(dataset=dataset, data_dir=data_dir))


def _keep_programs(place: pathlib.Path) -> None:
  """Lets JAX store what it compiles, unless the user has a cache already."""
  if jax.config.values["jax_compilation_cache_dir"] is not None:
    return
  # Small programs, too: a training run has thirty, a second and a half of work.
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  jax.config.update("jax_compilation_cache_dir", str(place))
  compilation_cache.reset_cache()
  # Read while another process writes it, a program is compiled once more.
  warnings.filterwarnings("ignore", "Error reading persistent compilation")


@contextlib.contextmanager
def _programs_kept(place: pathlib.Path) -> Iterator[None]:
  """What one cell compiles, later ones find; also after an interrupt.

  A cache of the user's own is left alone.
  """
  if jax.config.values["jax_compilation_cache_dir"] is not None:
    yield
    return
  least = jax.config.values["jax_persistent_cache_min_compile_time_secs"]
  _keep_programs(place)
  try:
    yield
  finally:
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
    compilation_cache.reset_cache()
  shutil.rmtree(place, ignore_errors=True)


def _done(cell: Cell) -> bool:
  return (cell.folder / "summary.json").is_file()


def _check(values: config.Config, cells: list[Cell]) -> None:
  """Refuses what some cell would refuse, before any was run."""
  if values.study_processes > 1 and jax.default_backend() != "cpu":
    raise errors.UserError(
      f"--study_processes={values.study_processes}: processes share the cores"
      f" of a CPU, and JAX computes on {jax.default_backend()!r} here. Expected"
      " --study_processes=1, which uses all devices for one cell after another."
    )
  for dataset in values.study_datasets:
    here = dataclasses.replace(values, dataset=dataset)
    data = setting.load_data(here)
    for clients in (values.num_clients, *values.study_clients):
      trained = dataclasses.replace(_of(here, clients), task="train")
      setting.build(trained, data)
    mine = [
      c.config
      for c in cells
      if c.config.task == "attack" and c.config.dataset == dataset
    ]
    for shape in {(c.local_steps, c.batch_size) for c in mine}:
      first = next(c for c in mine if (c.local_steps, c.batch_size) == shape)
      # All attacks at once, each built for this shape of updates.
      whole = dataclasses.replace(first, attack=values.attack)
      built = setting.build(whole, data)
      adversary.check(whole, built, attack.attacked_shapes(whole, built))


def collect(
  cells: list[Cell], encryption: list[dict[str, Any]] | None = None
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
      training += _training_lines(values, found)
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
  values: config.Config, found: dict[str, Any]
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
  judged = claims.judge(results, [frontier.mixing_helps])
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
    "ablation": [_plain(a._asdict()) for a in frontier.ablation(results)],
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


def _totals(cells: list[Cell], seconds: float) -> dict[str, Any]:
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
