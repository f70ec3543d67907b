"""Checkpoints of a run: whole, verified, and never trusted blindly.

Orbax writes the arrays; a folder gets its name only when it is complete, so
that a process that dies at any moment leaves the checkpoints before. Each lists
the SHA-256 of its files, which are compared before anything reads them: a
damaged file can still be read, or take the process down that tries.
"""

from collections.abc import Callable
import hashlib
import json
import pathlib
import re
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp

from mpqfl_jax.types import PyTree

_NAME = re.compile(r"step_(\d+)")
# How many checkpoints stay.
KEEP = 2
_PARTIAL, _FILES = "partial", "files.json"


class DamagedError(Exception):
  """A checkpoint that is not the one that was saved."""


def steps(folder: pathlib.Path) -> list[int]:
  """The steps of which there are checkpoints, in order."""
  names = (_NAME.fullmatch(path.name) for path in folder.glob("step_*"))
  return sorted(int(match[1]) for match in names if match)


def save(
  folder: pathlib.Path, step: int, tree: PyTree, keep: int = KEEP
) -> None:
  """Saves a checkpoint and then removes all but the newest few.

  Args:
    folder: holds the checkpoints of one training run.
    step: larger than any before.
    tree: a pytree of arrays; NumPy's keep their dtypes.
    keep: how many stay.
  """
  for left in folder.glob(f"{_PARTIAL}*"):
    shutil.rmtree(left)
  partial = folder.resolve() / _PARTIAL
  with _checkpointer() as checkpointer:
    checkpointer.save(partial, _on_host(tree))
  (partial / _FILES).write_text(json.dumps(_digests(partial)))
  complete = folder / f"step_{step:08d}"
  if complete.exists():  # Damaged, or the run would have gone on from it.
    shutil.rmtree(complete)
  partial.rename(complete)
  for old in steps(folder)[:-keep]:
    shutil.rmtree(folder / f"step_{old:08d}")


def restore_latest(
  folder: pathlib.Path, like: PyTree, warn: Callable[[str], None]
) -> tuple[int, PyTree] | None:
  """Restores the newest checkpoint that is whole.

  Args:
    folder: where `save` wrote.
    like: a pytree of the same structure, shapes and dtypes.
    warn: told of each checkpoint that had to be passed over.

  Returns:
    (step, tree) with NumPy arrays, None where there is none that is whole.
  """
  like = _on_host(like)
  for step in reversed(steps(folder)):
    path = folder / f"step_{step:08d}"
    try:
      return step, _restore(path, like)
    # Orbax and its storage layers raise whatever they like at a damaged file.
    except Exception as e:
      reason = str(e).splitlines()[0] if str(e) else type(e).__name__
      warn(f"checkpoint {path} is damaged, taking the one before: {reason}")
  return None


def _restore(path: pathlib.Path, like: PyTree) -> PyTree:
  if json.loads((path / _FILES).read_text()) != _digests(path):
    raise DamagedError("its files are not the ones that were saved")
  with _checkpointer() as checkpointer:
    found = checkpointer.restore(path.resolve(), like)
  tree = jax.tree.map(
    lambda want, got: np.asarray(got, want.dtype), like, found
  )
  for want, got in zip(*map(jax.tree.leaves, (like, tree)), strict=True):
    if want.shape != got.shape:
      raise DamagedError(f"an array has shape {got.shape}, not {want.shape}")
  return tree


def _checkpointer() -> ocp.StandardCheckpointer:
  """Orbax's, waiting for no other process: what is saved is on this host."""
  mine = jax.process_index()
  return ocp.StandardCheckpointer(
    multiprocessing_options=ocp.options.MultiprocessingOptions(
      primary_host=mine,
      active_processes={mine} if jax.process_count() > 1 else None,
    )
  )


def _on_host(tree: PyTree) -> PyTree:
  return jax.tree.map(np.asarray, jax.device_get(tree))


def _digests(path: pathlib.Path) -> dict[str, str]:
  """SHA-256 of every file below a folder, by its name there."""
  digests = {}
  for file in sorted(path.rglob("*")):
    if file.is_file() and file.name != _FILES:
      with file.open("rb") as data:
        digest = hashlib.file_digest(data, "sha256").hexdigest()
      digests[str(file.relative_to(path))] = digest
  return digests
