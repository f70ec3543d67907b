"""Checkpoints of a run: whole, verified, and never trusted blindly.

Orbax writes the arrays; a folder gets its name only when it is complete, so
that a process that dies at any moment leaves the checkpoints before. Each holds
a SHA-256 of its arrays, because a damaged file can still be read.
"""

from collections.abc import Callable
import hashlib
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


class DamagedError(Exception):
  """A checkpoint whose arrays are not the ones that were saved."""


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
  tree = _on_host(tree)
  with _checkpointer() as checkpointer:
    checkpointer.save(
      folder.resolve() / f"step_{step:08d}",
      {"tree": tree, "sha256": _digest(tree)},
      force=True,
    )
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
  target = {"tree": like, "sha256": np.zeros(32, np.uint8)}
  with _checkpointer() as checkpointer:
    found = checkpointer.restore(path.resolve(), target)
  tree = jax.tree.map(
    lambda want, got: np.asarray(got, want.dtype), like, found["tree"]
  )
  for want, got in zip(*map(jax.tree.leaves, (like, tree)), strict=True):
    if want.shape != got.shape:
      raise DamagedError(f"an array has shape {got.shape}, not {want.shape}")
  if not np.array_equal(_digest(tree), np.asarray(found["sha256"])):
    raise DamagedError("its arrays do not have the digest they were saved with")
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


def _digest(tree: PyTree) -> np.ndarray:
  digest = hashlib.sha256()
  for leaf in jax.tree.leaves(tree):
    array = np.ascontiguousarray(leaf)
    digest.update(f"{array.dtype}{array.shape}".encode())
    digest.update(array.tobytes())
  return np.frombuffer(digest.digest(), np.uint8)
