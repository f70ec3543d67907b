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
import pathlib
import shutil
import sys
import time
import warnings

import jax
from jax.experimental.compilation_cache import compilation_cache

from experiments import (
  adversary,
  attack,
  config,
  costs,
  folder,
  setting,
  study_grid,
  study_progress,
  study_results,
  train,
  workers,
)
from experiments.study_grid import Cell
from mpqfl_jax import datasets, errors


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
  cells = study_grid.cells(values)
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
    study_grid.GRID,
  )
  todo = [cell for cell in cells if not _done(cell)]
  place = run_dir / "compiled"
  perform = functools.partial(_perform, measure, place)
  with study_progress.table(cells, todo) as advance, _programs_kept(place):
    for cell in _performed(values, perform, todo):
      advance(cell)
  results = study_results.collect(cells, encryption)
  written = study_results.write(run_dir, values, results)
  folder.write_json(
    run_dir / "summary.json",
    {**written, **study_results.totals(cells, time.perf_counter() - begin)},
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
      trained = dataclasses.replace(
        study_grid.of_clients(here, clients),
        task="train",
        attack_rounds=study_grid.late_rounds(values),
      )
      built = setting.build(trained, data)
      adversary.check(trained, built, train.attacked_shapes(trained, built))
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
