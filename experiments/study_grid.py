"""The grid of a study: cells, each an ordinary run with a hash for a name."""

import dataclasses
import hashlib
import json
import pathlib
from typing import NamedTuple

from experiments import config

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
GRID = (*_STUDY, "defense", "attack", "attack_knowledge")


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


def cells(values: config.Config) -> list[Cell]:
  """All cells, those of one data set after another.

  Training is attacked under the first seed alone, in the rounds of
  `--attack_rounds` after the first: the weights of the first round are those
  that the attack cells take.
  """
  late = late_rounds(values)
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
        cell = _train(
          of_clients(here, clients), here.study_seeds[0], spec, late
        )
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


def late_rounds(values: config.Config) -> tuple[int, ...]:
  """The rounds in which training is attacked."""
  return tuple(r for r in values.attack_rounds if r > 1)


def of_clients(values: config.Config, clients: int) -> config.Config:
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
