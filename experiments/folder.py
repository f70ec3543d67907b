"""A run's folder: made safely, written so that a crash loses nothing."""

from collections.abc import Callable, Mapping
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import tempfile
from typing import Any

import jax
import numpy as np

from mpqfl_jax import errors

_MARK = "config.json"
# What may differ between the parts of one run.
_FREE = (
  "output_dir",
  "overwrite",
  "resume",
  "command",
  "versions",
  "commit",
  "host",
  "data_dir",
  "dataset_source",
  # How processes share the devices does not matter, `mesh_devices` does.
  "devices",
  "coordinator_address",
  "num_processes",
  "process_id",
  "writers",
)


def create(
  path: str,
  config: Mapping[str, Any],
  overwrite: bool = False,
  resume: bool = False,
) -> pathlib.Path:
  """Makes the folder of a new run, or opens that of one to go on with.

  Args:
    path: where.
    config: what `config.json` will hold. A run goes on only under the values
      that it began with, those of `_FREE` aside.
    overwrite: whether a former run there may go. Only a folder that holds a
      `config.json` counts as a run.
    resume: whether to go on with the run that is there, if one is.

  Raises:
    UserError: something is there already, or it cannot be made.
  """
  folder = pathlib.Path(path)
  if resume and (folder / _MARK).is_file():
    _check_same(folder, config)
    return folder
  try:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
      if not overwrite:
        raise errors.UserError(
          f"{folder} exists already and nothing was changed. Give another"
          " --output_dir, --resume to go on with the run in it, or --overwrite"
          " to replace it."
        )
      if not (folder / _MARK).is_file():
        raise errors.UserError(
          f"{folder} holds no {_MARK}, so it is not a run and --overwrite"
          " leaves it alone. Give another --output_dir."
        )
      shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as e:
    raise errors.UserError(
      f"cannot make --output_dir={folder}: {e.strerror}. Give a folder that"
      " can be written."
    ) from e
  write_json(folder / _MARK, config)
  return folder


def _check_same(folder: pathlib.Path, config: Mapping[str, Any]) -> None:
  try:
    old = json.loads((folder / _MARK).read_text())
  except json.JSONDecodeError as e:
    raise errors.UserError(
      f"{folder / _MARK} is not JSON, so there is no run to go on with. Give"
      " another --output_dir, or --overwrite to begin anew."
    ) from e
  new = json.loads(json.dumps(config))
  differing = [
    f"--{name} was {old.get(name)!r} and is {value!r}"
    for name, value in new.items()
    if name not in _FREE and old.get(name) != value
  ]
  if differing:
    raise errors.UserError(
      f"{folder} cannot go on under another config: {'; '.join(differing)}."
      " Give the values that it began with, or another --output_dir."
    )


def write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
  """Writes a JSON file whole or not at all."""
  write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def write_atomically(path: pathlib.Path, data: bytes) -> None:
  """Writes a file whole or not at all."""
  path.parent.mkdir(parents=True, exist_ok=True)
  handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
  try:
    with os.fdopen(handle, "wb") as file:
      file.write(data)
    os.chmod(name, 0o644)
    os.replace(name, path)
  except BaseException:
    os.unlink(name)
    raise


def append_line(path: pathlib.Path, value: Mapping[str, Any]) -> None:
  """Adds a JSON line and hands it to the operating system at once."""
  with path.open("a") as file:
    file.write(json.dumps(value) + "\n")


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
  """A file of JSON lines, without one that a dying process left unfinished."""
  lines = []
  for line in path.read_text().splitlines():
    try:
      lines.append(json.loads(line))
    except json.JSONDecodeError:
      continue
  return lines


def keep_lines(
  path: pathlib.Path, keep: Callable[[dict[str, Any]], bool]
) -> None:
  """Rewrites a file of JSON lines with those that are to be kept.

  A last line that a dying process left unfinished goes, too.
  """
  if not path.is_file():
    return
  kept = [json.dumps(v) + "\n" for v in read_lines(path) if keep(v)]
  write_atomically(path, "".join(kept).encode())


def slug(text: str) -> str:
  """A file name for a defence or an attack."""
  return re.sub(r"[^A-Za-z0-9.=-]+", "-", text).strip("-")


def number(value: Any) -> float | None:
  """A float for JSON; None for None, NaN and infinity, which JSON has not."""
  return float(value) if value is not None and np.isfinite(value) else None


def environment() -> dict[str, Any]:
  """Versions, commit and host, for `config.json`."""
  packages = ("mpqfl_jax", "jax", "jaxlib", "flax", "optax", "numpy")
  return {
    "versions": {
      "python": platform.python_version(),
      **{name: importlib.metadata.version(name) for name in packages},
    },
    "commit": _commit(),
    "host": {
      "platform": platform.platform(),
      "cores": os.cpu_count(),
      "backend": jax.default_backend(),
      "devices": [str(device) for device in jax.devices()],
      "xla_flags": os.environ.get("XLA_FLAGS", ""),
    },
  }


def _commit() -> str | None:
  """The checkout's commit, marked where it has changes; None outside one."""
  root = pathlib.Path(__file__).resolve().parent.parent

  def git(*args: str) -> str:
    return subprocess.run(
      ["git", "-C", str(root), *args],
      capture_output=True,
      check=True,
      text=True,
    ).stdout.strip()

  try:
    # A package installed under somebody else's checkout is not that checkout.
    if pathlib.Path(git("rev-parse", "--show-toplevel")).resolve() != root:
      return None
    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
  except (OSError, subprocess.CalledProcessError):
    return None
