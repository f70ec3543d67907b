"""Reads a run's folder; nothing else in the report touches the run."""

from collections.abc import Iterator
import json
import pathlib
from typing import Any, NamedTuple

import numpy as np

from mpqfl_jax import errors


class Reconstructions(NamedTuple):
  """The images of one attack on one defence in one round.

  Attributes:
    attack, knowledge, defense: names, as in `attacks.jsonl`.
    round: the round of the attacked updates.
    original, reconstruction: [n, height, width, channels], float32 in [0, 1],
      in one order.
    label, recovered_label, client: [n], int.
  """

  attack: str
  knowledge: str
  defense: str
  round: int
  original: np.ndarray
  reconstruction: np.ndarray
  label: np.ndarray
  recovered_label: np.ndarray
  client: np.ndarray


class Run(NamedTuple):
  """A run's folder in memory.

  Attributes:
    folder: where it lies.
    config: `config.json`.
    summary: `summary.json`.
    rounds: the lines of `metrics.jsonl`, none for an `attack` task.
    attacks: the lines of `attacks.jsonl`, none where no attack was set.
    reconstructions: one an npz file, in the order of the defences, the
      blind attack before the adaptive one.
  """

  folder: pathlib.Path
  config: dict[str, Any]
  summary: dict[str, Any]
  rounds: list[dict[str, Any]]
  attacks: list[dict[str, Any]]
  reconstructions: list[Reconstructions]


class Cell(NamedTuple):
  """One attack on one defence, as `summary.json` has it.

  Attributes:
    attack, knowledge: names.
    psnr_db_median, psnr_db_max, ssim_median, success_rate: its values; None
      where the run wrote null.
    reason: why there is nothing to measure, None where there is.
    round: of the attacked updates, None where all are of one.
  """

  attack: str
  knowledge: str
  psnr_db_median: float | None
  psnr_db_max: float | None
  ssim_median: float | None
  success_rate: float | None
  reason: str | None = None
  round: int | None = None

  @property
  def regime(self) -> str:
    """What the attacker knows, and the round where several were attacked."""
    where = "" if self.round is None else f", round {self.round}"
    return f"{self.knowledge}{where}"


def read(run_dir: str | pathlib.Path) -> Run:
  """Reads the files of a finished run.

  Args:
    run_dir: the run's folder.

  Raises:
    UserError: the folder holds no finished run, or a file is not what its
      name says.
  """
  folder = pathlib.Path(run_dir)
  for name in ("config.json", "summary.json"):
    if not (folder / name).is_file():
      raise errors.UserError(
        f"{folder} holds no {name}; expected the --output_dir of a finished"
        " run."
      )
  config = _json(folder / "config.json")
  summary = _json(folder / "summary.json")
  if not summary.get("defenses"):
    raise errors.UserError(
      f"{folder / 'summary.json'} names no defenses; expected the summary of"
      " a train or an attack task."
    )
  place = {name: i for i, name in enumerate(summary["defenses"])}
  sets = [
    reconstructions(p) for p in sorted(folder.glob("reconstructions/*.npz"))
  ]
  # The blind attack first: the adaptive one is read against it.
  sets.sort(
    key=lambda s: (place.get(s.defense, len(place)), s.knowledge != "blind")
  )
  return Run(
    folder=folder,
    config=config,
    summary=summary,
    rounds=lines(folder / "metrics.jsonl"),
    attacks=lines(folder / "attacks.jsonl"),
    reconstructions=sets,
  )


def task(run_dir: str | pathlib.Path) -> str | None:
  """The task of a run's folder, None where its config is not there."""
  path = pathlib.Path(run_dir) / "config.json"
  return setting(_json(path), "task") if path.is_file() else None


def finished(
  run_dir: str | pathlib.Path, name: str
) -> tuple[pathlib.Path, dict[str, Any], dict[str, Any]]:
  """A finished run of one task: its folder, summary and config.

  Makes the folder `figures/` in it.

  Raises:
    UserError: the folder holds no finished run of that task.
  """
  folder = pathlib.Path(run_dir)
  path = folder / "summary.json"
  summary = _json(path) if path.is_file() else {}
  if summary.get("task") != name:
    raise errors.UserError(
      f"{path} has no figures; expected the summary of a {name} task."
    )
  (folder / "figures").mkdir(exist_ok=True)
  return folder, summary, _json(folder / "config.json")


def _json(path: pathlib.Path) -> dict[str, Any]:
  try:
    return json.loads(path.read_text())
  except json.JSONDecodeError as e:
    raise errors.UserError(f"{path} is not JSON: {e}.") from e


def lines(path: pathlib.Path) -> list[dict[str, Any]]:
  """Reads a file of JSON lines, none where it is not there."""
  if not path.is_file():
    return []
  out = []
  for number, line in enumerate(path.read_text().splitlines(), 1):
    try:
      out.append(json.loads(line))
    except json.JSONDecodeError as e:
      raise errors.UserError(f"{path}, line {number}, is not JSON: {e}.") from e
  return out


def reconstructions(path: pathlib.Path) -> Reconstructions:
  """Reads an npz file of a run's `reconstructions/`."""
  with np.load(path) as file:
    missing = sorted(set(Reconstructions._fields) - set(file.files))
    if missing:
      raise errors.UserError(f"{path} lacks {', '.join(missing)}.")
    values = {name: file[name] for name in Reconstructions._fields}
  for name in ("attack", "knowledge", "defense"):
    values[name] = str(values[name])
  values["round"] = int(values["round"])
  return Reconstructions(**values)


def cells(entry: dict[str, Any]) -> Iterator[Cell]:
  """The attacks on one defence, one a round where there were several.

  Early weights give away more than late ones: a median over both would be the
  score of neither.

  Args:
    entry: a value of `summary["defenses"]`.
  """
  for attack, regimes in (entry.get("attacks") or {}).items():
    for knowledge, values in regimes.items():
      rounds = values.get("rounds") or {None: values}
      for number, found in rounds.items():
        cell = Cell(
          attack, knowledge, *(found.get(n) for n in Cell._fields[2:-1])
        )
        yield cell if number is None else cell._replace(round=int(number))


def strongest(entry: dict[str, Any]) -> Cell | None:
  """The attack with the highest median PSNR, None where there was none."""
  known = [c for c in cells(entry) if c.psnr_db_median is not None]
  return max(known, key=lambda c: c.psnr_db_median or 0.0, default=None)


def reason(entry: dict[str, Any]) -> str | None:
  """Why no attack on a defence has anything to work on, None where one has."""
  reasons = {cell.reason for cell in cells(entry)}
  return next(iter(reasons)) if len(reasons) == 1 else None


def setting(config: dict[str, Any], name: str) -> Any:
  """The value of a flag, at whatever depth `config.json` holds it, or None."""
  if name in config:
    return config[name]
  for value in config.values():
    if isinstance(value, dict):
      found = setting(value, name)
      if found is not None:
        return found
  return None
