"""A run's folder: made safely, written so that a crash loses nothing."""

from collections.abc import Callable, Collection, Mapping
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
import zlib

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


# What follows from flags and machine: (name in the config, (the run's, the
# present one) -> what differs). Earlier ones explain later ones.
_DERIVED: tuple[tuple[str, Callable[[Any, Any], str]], ...] = (
  (
    "mesh_devices",
    lambda old, new: (
      f"the run was made on {old} device{'s'[: old != 1]}, and this would go on"
      f" with {new}. Give --devices={old}, or as many in all processes together"
    ),
  ),
  (
    "plan_resolved",
    lambda old, new: (
      f"its plan is {old['name']} ({old['reason']}), and here it would be"
      f" {new['name']} ({new['reason']}). Use the same kind of machine"
    ),
  ),
  (
    "matmul_precision",
    lambda old, new: (
      f"its products were made in {old} precision, and would be made in {new}."
      " Set JAX_DEFAULT_MATMUL_PRECISION as it was, or unset it"
    ),
  ),
  (
    "parameters",
    lambda old, new: (
      f"the model had {old:,} parameters and has {new:,} now. Use the model and"
      " the images that the run began with"
    ),
  ),
  (
    "client_state_resolved",
    lambda old, new: (
      "the states of clients would be kept elsewhere, or in other blocks, than"
      " they were. Use a machine with as much memory"
    ),
  ),
)


def check(path: str, overwrite: bool = False, resume: bool = False) -> None:
  """Refuses a folder that `create` would refuse, before it costs anything.

  Args:
    path, overwrite, resume: as for `create`.

  Raises:
    UserError: something is there already that has to stay.
  """
  folder = pathlib.Path(path)
  try:
    if not folder.exists():
      return
    if not folder.is_dir():
      raise errors.UserError(
        f"--output_dir={folder} is a file and was left alone. Give a folder,"
        " such as runs/mine."
      )
    if not any(folder.iterdir()):
      return
  except OSError as e:
    raise errors.UserError(
      f"cannot read --output_dir={folder}: {e.strerror}. Give a folder that can"
      " be read and written."
    ) from e
  if not _is_run(folder):
    asked = "--overwrite" if overwrite else "--resume" if resume else None
    raise errors.UserError(
      f"{folder} holds files but no {_MARK} of a run, so it is not a run and"
      f" {f'{asked} leaves it alone' if asked else 'was left alone'}. Give"
      " another --output_dir."
    )
  if not overwrite and not resume:
    raise errors.UserError(
      f"{folder} exists already and nothing was changed. Give another"
      " --output_dir, --resume to go on with the run in it, or --overwrite"
      " to replace it."
    )


def _is_run(folder: pathlib.Path) -> bool:
  """Whether a run's config is there, or the damaged rest of one."""
  mark = folder / _MARK
  try:
    found = json.loads(mark.read_bytes())
  except ValueError:
    return True
  except OSError:
    return mark.is_file()
  return isinstance(found, dict) and {"task", "seed"} <= found.keys()


def stored(path: str) -> dict[str, Any] | None:
  """The config of the run in a folder, None where there is no run.

  Raises:
    UserError: it cannot be read.
  """
  mark = pathlib.Path(path) / _MARK
  if not mark.is_file():
    return None
  try:
    return json.loads(mark.read_bytes())
  except (OSError, ValueError) as e:
    raise errors.UserError(
      f"{mark} is not JSON, so there is no run to go on with. Give"
      " another --output_dir, or --overwrite to begin anew."
    ) from e


def create(
  path: str,
  config: Mapping[str, Any],
  overwrite: bool = False,
  resume: bool = False,
  free: Collection[str] = (),
) -> pathlib.Path:
  """Makes the folder of a new run, or opens that of one to go on with.

  Args:
    path: where.
    config: what `config.json` will hold. A run goes on only under the values
      that it began with, those of `_FREE` aside.
    overwrite: whether a former run there may go. Only a folder that holds the
      `config.json` of a run counts as one.
    resume: whether to go on with the run that is there, if one is.
    free: names in the config that may have changed since; the new ones are
      kept.

  Raises:
    UserError: something is there already, or it cannot be made.
  """
  folder = pathlib.Path(path)
  check(path, overwrite, resume)
  old = stored(path) if resume else None
  if old is not None:
    # As a file has it: tuples are lists there.
    new = json.loads(json.dumps(config))
    _check_same(folder, old, new, free)
    if any(
      _binding(name, old.get(name)) != _binding(name, new[name])
      for name in free
    ):
      write_json(folder / _MARK, config)
    return folder
  try:
    if overwrite and (folder / _MARK).is_file():
      shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as e:
    raise errors.UserError(
      f"cannot make --output_dir={folder}: {e.strerror}. Give a folder that"
      " can be written."
    ) from e
  write_json(folder / _MARK, config)
  return folder


def _check_same(
  folder: pathlib.Path,
  old: Mapping[str, Any],
  new: Mapping[str, Any],
  free: Collection[str],
) -> None:
  differing = [
    name
    for name, value in new.items()
    if name not in _FREE
    and name not in free
    and _binding(name, old.get(name)) != _binding(name, value)
  ]
  derived = dict(_DERIVED)
  by_flag = [
    f"--{name} was {_flag(old.get(name))} and is {_flag(new[name])}"
    for name in differing
    if name not in derived
  ]
  if by_flag:
    raise errors.UserError(
      f"{folder} cannot go on under another config: {'; '.join(by_flag)}. Leave"
      " these flags out, for the values that it began with, or give another"
      " --output_dir."
    )
  for name, words in _DERIVED:
    if name in differing:
      why = f"its {_MARK} does not say {name}, as of an older version. Give"
      if name in old:
        why = f"{words(old[name], new[name])}, or give"
      raise errors.UserError(
        f"{folder} cannot go on here: {why} another --output_dir."
      )


def _binding(name: str, value: Any) -> Any:
  """What of a stored value has to stay.

  Of a plan not why it was picked; an empty list is what an older version, which
  did not have the flag, says nothing of.
  """
  if name == "plan_resolved" and value is not None:
    return {k: v for k, v in value.items() if k != "reason"}
  if value == []:
    return None
  return value


def _flag(value: Any) -> str:
  """A stored value as the command line has it."""
  if value is None:
    return "not given"
  return ",".join(map(str, value)) if isinstance(value, list) else str(value)


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
  """A file name for a defence or an attack, another one for each.

  Wildcards, which file names should not hold, are told apart by a checksum.
  """
  name = re.sub(r"[^A-Za-z0-9.=-]+", "-", text).strip("-")
  if re.search(r"[*?!\[\]]", text):
    name += f"-{zlib.crc32(text.encode()):08x}"
  return name


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
