"""The task `scaling`: what a round costs against the number of its clients.

Every cohort size is a training run in a process of its own, because the peak
memory of a process never goes down again.
"""

from collections.abc import Iterator
import dataclasses
import json
import pathlib
import subprocess
import sys
import time
from typing import Any

import numpy as np

from experiments import costs, folder, setting
from experiments.config import Config
from mpqfl_jax import errors

# What a measured run does not take over.
_OTHER = (
  *("task", "output_dir", "overwrite", "resume", "scaling_clients"),
  "study_encryption",
)


def run(
  config: Config, built: setting.Setting, run_dir: pathlib.Path
) -> dict[str, Any]:
  """Trains at each cohort size under each defence and writes what it cost.

  Args:
    config: the run's.
    built: only to show mistakes before the first run.
    run_dir: the run's folder; the runs are in `cohorts/`, and one that is
      finished is not run again. Lines of `scaling.jsonl` are written as soon as
      they are known.

  Returns:
    What `summary.json` holds.

  Raises:
    UserError: a run fails.
  """
  begin = time.perf_counter()
  encryption = costs.encryption(config.study_encryption)
  path = run_dir / "scaling.jsonl"
  path.unlink(missing_ok=True)
  lines = []
  for clients in config.scaling_clients:
    for defense in built.defenses:
      name = f"{folder.slug(defense.spec)}_{clients}"
      place = run_dir / "cohorts" / name
      if not (place / "summary.json").is_file():
        _measure(config, defense.spec, clients, place)
      lines.append(_line(defense.spec, clients, place))
      folder.append_line(path, lines[-1])
  return {
    "task": config.task,
    "scaling": lines,
    "encryption": encryption,
    "uplink_bytes_per_client_float32": built.float32_bytes,
    "seconds": time.perf_counter() - begin,
    "peak_rss_mb": max(line["peak_rss_mb"] for line in lines),
  }


def arguments(
  config: Config, defense: str, clients: int, place: pathlib.Path
) -> list[str]:
  """The command line of one measured run."""
  values = {
    field.name: getattr(config, field.name)
    for field in dataclasses.fields(config)
    if field.name not in _OTHER
  } | {
    "task": "train",
    "output_dir": str(place),
    "resume": True,
    "defense": (defense,),
    "cohort_size": clients,
    "attack": (),
    # Neither tests nor checkpoints belong to the cost of a round.
    "eval_every": config.rounds,
    "checkpoint_every": 0,
  }

  def text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)

  return [
    f"--{name}={text(value)}"
    for name, value in values.items()
    if value is not None
  ]


def _measure(
  config: Config, defense: str, clients: int, place: pathlib.Path
) -> None:
  done = subprocess.run(
    [
      sys.executable,
      "-m",
      "experiments.main",
      *arguments(config, defense, clients, place),
    ],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  )
  if done.returncode:
    said = [line for line in done.stderr.splitlines() if line.strip()]
    reason = said[-1].removeprefix("error: ") if said else "it said nothing"
    raise errors.UserError(
      f"the run of {clients} clients under {defense} ended with status"
      f" {done.returncode}: {reason}"
    )


def _line(defense: str, clients: int, place: pathlib.Path) -> dict[str, Any]:
  config = json.loads((place / "config.json").read_text())
  found = json.loads((place / "summary.json").read_text())
  rounds = list(_rounds(place))
  # The first round warms up, the last ends with a test.
  warm = rounds[1:-1] or rounds[1:] or rounds
  seconds = float(np.median([r["seconds"] for r in warm]))
  return {
    "defense": defense,
    "clients": clients,
    "num_clients": config["num_clients"],
    "seconds_per_round": seconds,
    "client_updates_per_second": clients / seconds,
    "uplink_bytes": float(np.mean([r["uplink_bytes"] for r in rounds])),
    "downlink_bytes": float(np.mean([r["downlink_bytes"] for r in rounds])),
    "peak_rss_mb": found["peak_rss_mb"],
    "peak_device_mb": found["peak_device_mb"],
    "compile_seconds": found["compile_seconds"],
    "rounds": len(rounds),
    "test_accuracy": found["test_accuracy"],
    "plan": config["plan_resolved"],
    "devices": config["mesh_devices"],
  }


def _rounds(place: pathlib.Path) -> Iterator[dict[str, Any]]:
  for line in (place / "metrics.jsonl").read_text().splitlines():
    yield json.loads(line)
