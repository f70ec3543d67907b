"""What `summary.json` holds."""

import hashlib
import resource
import sys
import time
from typing import Any

import jax
import numpy as np

from experiments import folder
from experiments.config import Config
from mpqfl_jax import accounting, trees
from mpqfl_jax.defenses import Defense
from mpqfl_jax.types import Params


def params_sha256(params: Params) -> str:
  """SHA-256 of the float32 little-endian leaves in sorted path order."""
  digest = hashlib.sha256()
  names = trees.leaf_names(params)
  leaves = jax.tree.leaves(params)
  for _, leaf in sorted(zip(names, leaves, strict=True), key=lambda p: p[0]):
    digest.update(np.asarray(leaf).astype("<f4").tobytes())
  return digest.hexdigest()


def guarantee(
  defense: Defense, ledger: accounting.Ledger, delta: float
) -> dict[str, Any]:
  """What a defence has proven by the end: epsilon, delta, of whom, for whom.

  Args:
    defense: the defence.
    ledger: what was released.
    delta: of the (epsilon, delta).
  """
  proof = defense.guarantee
  return {
    "epsilon": folder.number(defense.epsilon(ledger, delta)),
    "delta": None if proof is None else delta,
    "epsilon_model": None if proof is None else proof.model,
    "epsilon_unit": None if proof is None else proof.unit,
  }


def postfix(accuracy: float, epsilon: float | None) -> dict[str, str]:
  """What the progress bar says of a round."""
  words = {}
  if np.isfinite(accuracy):
    words["accuracy"] = f"{accuracy:.1%}"
  if epsilon is not None:
    words["epsilon"] = f"{epsilon:.3g}"
  return words


def peak_rss_mb() -> float:
  """The most memory that this process has held, MiB."""
  # Linux counts in KiB, macOS in bytes.
  unit = 1 if sys.platform == "darwin" else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def of_run(
  config: Config,
  entries: dict[str, dict[str, Any]],
  references: dict[str, Any],
  float32_bytes: int,
  begin: float,
) -> dict[str, Any]:
  """Puts the parts together; figures of the whole run are its first defence's.

  Args:
    config: the run's.
    entries: defense -> its figures.
    references: of the attacked images, empty where none were.
    float32_bytes: length of an update's message without a codec.
    begin: `time.perf_counter()` at the start.
  """
  first = next(iter(entries.values()))
  stats = jax.local_devices()[0].memory_stats() or {}
  device = stats.get("peak_bytes_in_use")
  return {
    "task": config.task,
    "test_accuracy": first["test_accuracy"],
    "rounds": config.rounds if config.task == "train" else 0,
    "final_params_sha256": first["final_params_sha256"],
    "uplink_bytes_per_client": first["uplink_bytes_per_client"],
    "uplink_bytes_per_client_float32": float32_bytes,
    "seconds": time.perf_counter() - begin,
    "compile_seconds": sum(e["compile_seconds"] for e in entries.values()),
    "peak_rss_mb": peak_rss_mb(),
    "peak_device_mb": None if device is None else device / 2**20,
    "defenses": entries,
    "references": references,
  }
