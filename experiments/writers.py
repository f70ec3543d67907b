"""Where a round's metrics go beside `metrics.jsonl`: TensorBoard, W&B."""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import pathlib
from typing import Any, NamedTuple

from experiments import folder
from experiments.config import Config
from mpqfl_jax import errors


class Writer(NamedTuple):
  """A place for the metrics of one defence's training.

  Attributes:
    write: takes a line of `metrics.jsonl`.
    close: nothing is written after it.
  """

  write: Callable[[dict[str, Any]], None]
  close: Callable[[], None]


def make(
  config: Config, defense: str, run_dir: pathlib.Path, done: int
) -> list[Writer]:
  """The writers that `--writers` names, for one defence.

  Args:
    config: the run's.
    defense: whose curves.
    run_dir: the run's folder.
    done: rounds that are finished already; what was written of later ones goes.

  Raises:
    UserError: no such writer, or one that is not installed.
  """
  return [
    _known(name)(config, defense, run_dir, done) for name in config.writers
  ]


def check(names: Sequence[str]) -> None:
  """Raises UserError for a writer that is unknown or not installed."""
  for name in names:
    _known(name)
    _import(name)


def _import(name: str) -> Any:
  package = WRITERS[name][1]
  try:
    return __import__(package)
  except ImportError as e:
    raise errors.UserError(
      f"--writers={name} needs {package}, which is not installed. Install it:"
      f" pip install {package}"
    ) from e


def _known(name: str) -> Callable[..., Writer]:
  if name not in WRITERS:
    raise errors.unknown_name("writer", name, WRITERS)
  return WRITERS[name][0]


def _tensorboard(
  config: Config, defense: str, run_dir: pathlib.Path, done: int
) -> Writer:
  """Event files under `tensorboard/`, a run a defence."""
  del config
  out = _import("tensorboard").SummaryWriter(
    str(run_dir / "tensorboard" / folder.slug(defense)),
    purge_step=done + 1 if done else None,
    # Else one that starts within the same second replaces the file.
    filename_suffix=f".from{done + 1}",
  )

  def write(line: dict[str, Any]) -> None:
    for name, value in _scalars(line):
      out.add_scalar(name, value, line["round"])
    out.flush()

  return Writer(write, out.close)


def _wandb(
  config: Config, defense: str, run_dir: pathlib.Path, done: int
) -> Writer:
  """A W&B run a defence, grouped by the run's folder."""
  del done  # lines of steps that W&B has already are dropped by it
  run = _import("wandb").init(
    project="mpqfl_jax",
    group=run_dir.name,
    name=defense,
    id=folder.slug(f"{run_dir.resolve()}-{defense}")[-120:],
    resume="allow",
    dir=str(run_dir),
    config=dataclasses.asdict(config),
  )

  def write(line: dict[str, Any]) -> None:
    run.log(dict(_scalars(line)), step=line["round"])

  return Writer(write, run.finish)


def _scalars(
  line: dict[str, Any], prefix: str = ""
) -> Iterator[tuple[str, float]]:
  for name, value in line.items():
    if isinstance(value, dict):
      yield from _scalars(value, f"{prefix}{name}/")
    elif name != "round" and isinstance(value, int | float):
      yield prefix + name, value


# name -> (constructor, the package that it needs)
WRITERS: dict[str, tuple[Callable[..., Writer], str]] = {
  "tensorboard": (_tensorboard, "tensorboardX"),
  "wandb": (_wandb, "wandb"),
}
