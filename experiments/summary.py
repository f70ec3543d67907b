"""What `summary.json` holds."""

import hashlib
import resource
import sys
import time
from typing import Any

import jax
import numpy as np

from experiments.config import Config
from mpqfl_jax import trees
from mpqfl_jax.types import Params


def params_sha256(params: Params) -> str:
  """SHA-256 of the float32 little-endian leaves in sorted path order."""
  digest = hashlib.sha256()
  names = trees.leaf_names(params)
  leaves = jax.tree.leaves(params)
  for _, leaf in sorted(zip(names, leaves, strict=True), key=lambda p: p[0]):
    digest.update(np.asarray(leaf).astype("<f4").tobytes())
  return digest.hexdigest()


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
  # Linux counts in KiB, macOS in bytes.
  unit = 1 if sys.platform == "darwin" else 1024
  rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
  return {
    "task": config.task,
    "test_accuracy": first["test_accuracy"],
    "rounds": config.rounds if config.task == "train" else 0,
    "final_params_sha256": first["final_params_sha256"],
    "uplink_bytes_per_client": first["uplink_bytes_per_client"],
    "uplink_bytes_per_client_float32": float32_bytes,
    "seconds": time.perf_counter() - begin,
    "compile_seconds": sum(e["compile_seconds"] for e in entries.values()),
    "peak_rss_mb": rss / 2**20,
    "defenses": entries,
    "references": references,
  }
