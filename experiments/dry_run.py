"""`--dry_run`: what a run would do and cost, from two of its rounds.

Nothing stays on the disk. Seconds and memory are measured, not modelled: two
rounds run for each defence, the second of which is timed.
"""

from collections.abc import Callable, Iterator
import dataclasses
import json
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from experiments import folder, setting, summary
from experiments.config import Config
from mpqfl_jax import (
  accounting,
  columns,
  datasets,
  defenses,
  federated,
  precision,
)
from mpqfl_jax.types import Update

ROUNDS = 2


def text(
  config: Config,
  built: setting.Setting,
  measure: Callable[[Config, datasets.Dataset], pathlib.Path],
) -> str:
  """The resolved config, what each defence sends, bytes, seconds, memory.

  Args:
    config: the run's.
    built: what its defences share.
    measure: runs a config on a data set; returns the run's folder.
  """
  lines = ["The run, resolved:"]
  lines += [
    f"  --{name}={_flag(value)}"
    for name, value in dataclasses.asdict(config).items()
    if value is not None and name != "dry_run"
  ]
  lines += [
    f"  plan: {built.plan.name} on {built.mesh.devices.size} device(s),"
    f" {built.plan.reason}",
    f"  examples: {len(built.data.y_train):,} to train on,"
    f" {len(built.data.y_test):,} to test on, from {built.data.source}",
    f"  clients: {_population(built)}",
  ]
  for spec in config.defense:
    # As it is for one tree: the setting's sends SCAFFOLD's variates, too.
    defense = defenses.make(spec, built.template, built.protocol)
    update = _update(config, built, defense)
    lines += [
      "",
      f"What a client sends under {spec}:",
      precision.table(defense.codec, update, jax.random.key(config.seed)),
      *_noise(config, built, defense),
    ]
  if config.task == "train":
    lines += ["", *_costs(config, built, measure)]
  return "\n".join(lines)


def _population(built: setting.Setting) -> str:
  sizes = built.clients.sizes
  held = len(np.unique(built.clients.order))
  text = (
    f"{len(sizes):,} of {sizes.min():,} to {sizes.max():,} examples, half of"
    f" them of at most {int(np.median(sizes)):,}"
  )
  if held < sizes.sum():
    text += f"; {held:,} different ones, held by several"
  return text


def _noise(
  config: Config, built: setting.Setting, defense: defenses.Defense
) -> Iterator[str]:
  """What a mechanism with a proof adds, and what it proves by the end."""
  proof = defense.guarantee
  if proof is None:
    return
  clips = [norm for norm in defense.clips if np.isfinite(norm)]
  words = []
  if clips:
    words.append(f"clipped to a norm of {clips[0]:g}")
  if defense.noise_stddev:
    words.append(f"noise of deviation {defense.noise_stddev:.3g} on each entry")
  for part, what in (
    (defense.sgd, "each example's gradient"),
    (defense.central, "the sum, at a trusted server"),
  ):
    if part is not None:
      words.append(
        f"clip {part.clip:g} and {part.noise_multiplier:.3g} times as much"
        f" noise on {what}"
      )
  if defense.noise_in_codec:
    words.append("the codes are drawn at random")
  ledger = built.protocol.ledger
  yield (
    f"{'; '.join(words)}. Epsilon {defense.epsilon(ledger, config.delta):.3g}"
    f" at delta {config.delta:g} by the end ({proof.model} model, about one"
    f" {proof.unit}), for the client that sends most:"
    f" {accounting.most_releases(ledger)} times."
  )
  if defense.noise_stddev or defense.sgd is not None:
    yield "The table is of the update with its noise."


def _flag(value: object) -> str:
  return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _update(
  config: Config, built: setting.Setting, defense: defenses.Defense
) -> Update:
  """The first client's update at the initial weights, behind the transform."""
  client = federated.client(
    setting.training(config, built, defense),
    defense.transform,
    precision.make("none", built.template),
  )
  examples, who = setting.alone(built, 0)
  params = built.model.init(setting.key(config, setting.WEIGHTS))
  sent = federated.Broadcast(params, (), jnp.float32(built.rates.client(0)))
  key = setting.key(config, setting.ROUNDS)
  return jax.jit(client.turn)(
    sent, examples, who, client.init(params), key
  ).update


def _costs(
  config: Config,
  built: setting.Setting,
  measure: Callable[[Config, datasets.Dataset], pathlib.Path],
) -> list[str]:
  """Two rounds of each defence in a folder that is thrown away."""
  with tempfile.TemporaryDirectory() as place:
    trial = dataclasses.replace(
      config,
      rounds=ROUNDS,
      attack=(),
      attack_rounds=(1,),
      checkpoint_every=0,
      output_dir=f"{place}/run",
      resume=False,
      dry_run=False,
    )
    run_dir = measure(trial, built.data)
    rounds = folder.read_lines(run_dir / "metrics.jsonl")
    found = json.loads((run_dir / "summary.json").read_text())
  rows = [
    (
      "defence",
      "compiling, s",
      "s a round",
      f"s for {config.rounds}",
      "uplink a client, bytes",
      "uplink of the run, MB",
      "downlink, MB",
    )
  ]
  for spec, entry in found["defenses"].items():
    mine = [line for line in rounds if line["defense"] == spec]
    seconds = mine[-1]["seconds"]
    up, down = (
      config.rounds * np.mean([line[name] for line in mine]) / 1e6
      for name in ("uplink_bytes", "downlink_bytes")
    )
    rows.append(
      (
        spec,
        f"{entry['compile_seconds']:.1f}",
        f"{seconds:.2f}",
        f"{entry['compile_seconds'] + seconds * config.rounds:,.0f}",
        f"{entry['uplink_bytes_per_client']:,.0f}",
        f"{up:,.1f}",
        f"{down:,.1f}",
      )
    )
  peak = summary.peak_rss_mb()
  return [
    f"Costs of training, from {ROUNDS} rounds of each defence"
    " (attacks and the report come on top):",
    *columns.aligned(rows),
    f"Peak memory of the process: {peak:,.0f} MB; on the device:"
    f" {_device_peak()}.",
    "Nothing was written.",
  ]


def _device_peak() -> str:
  found = [
    (device.memory_stats() or {}).get("peak_bytes_in_use")
    for device in jax.local_devices()
  ]
  known = [peak for peak in found if peak is not None]
  return f"{max(known) / 2**20:,.0f} MB" if known else "it keeps no count"
