"""`--dry_run`: what a run would do and cost, from two of its rounds.

Nothing stays on the disk. Seconds and memory are measured, not modelled: two
rounds run for each defence, the second of which is timed, and a few iterations
of each attack.
"""

from collections.abc import Callable, Iterator
import dataclasses
import functools
import json
import pathlib
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from experiments import (
  adversary,
  attack,
  folder,
  setting,
  summary,
  train,
  view,
)
from experiments.config import Config
from mpqfl_jax import (
  accounting,
  attacks,
  columns,
  datasets,
  defenses,
  federated,
  layers,
  precision,
)
from mpqfl_jax.types import Model, Observation, Update

ROUNDS = 2
# Iterations of an attack that are timed.
ITERATIONS = 20
# Tasks with attacks: shapes of their updates, and how many of each defence.
_ATTACKED: dict[str, tuple[Callable, Callable]] = {
  "train": (
    train.attacked_shapes,
    lambda config, built: len(config.attack_rounds) * config.attack_clients,
  ),
  "attack": (
    attack.attacked_shapes,
    lambda config, built: built.clients.num_clients,
  ),
}


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
  if config.task in _ATTACKED and config.attack:
    lines += ["", *_attacks(config, built)]
  if config.task == "train":
    lines += [
      f"Peak memory of the process: {summary.peak_rss_mb():,.0f} MB; on the"
      f" device: {_device_peak()}."
    ]
  return "\n".join([*lines, "Nothing was written."])


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
  return [
    f"Costs of training, from {ROUNDS} rounds of each defence"
    " (the report comes on top):",
    *columns.aligned(rows),
  ]


def _attacks(config: Config, built: setting.Setting) -> list[str]:
  """A few iterations of each attack on updates as large as any."""
  shapes, count = _ATTACKED[config.task]
  known = shapes(config, built)
  readable = [d for d in built.defenses if not d.unreadable]
  if not known or not readable:
    return ["No update that an attack could read."]
  shape = max(known, key=lambda work: work.images * work.epochs)
  updates = count(config, built) * len(readable) * len(config.attack_knowledge)
  model = setting.model(config, built.data, layers.ATTACK_FORM)
  rows = [
    ("attack", "preparing, s", "ms an iteration", "iterations", "s, most")
  ]
  left = []
  for spec in config.attack:
    whole = adversary.make(
      spec, model, shape, built.data.x_train[: view.FEW_AUXILIARY]
    )
    if isinstance(whole, attacks.Direct):
      left.append(spec)
      continue
    restarts = config.attack_restarts or whole.restarts
    begin = time.perf_counter()
    whole.prepare()
    learned = time.perf_counter() - begin
    found = attacks.run(
      whole._replace(iterations=min(ITERATIONS, whole.iterations)),
      _observations(config, built, model, shape, updates * restarts),
      setting.key(config, setting.ATTACKS),
      restarts=1,
      devices=list(built.mesh.local_devices),
    )
    # Of a search that went on: one that has no more to do says nothing of it.
    each = found.seconds / max(int(found.iterations.sum()), 1)
    steps = updates * restarts * whole.iterations
    prepared = learned + found.compile_seconds
    rows.append(
      (
        spec,
        f"{prepared:.1f}",
        f"{1e3 * each:.2f}",
        f"{whole.iterations:,}",
        f"{prepared + each * steps:,.0f}",
      )
    )
  lines = []
  if len(rows) > 1:
    lines = [
      f"Costs of attacks on {updates} updates of at most {shape}, from"
      f" {ITERATIONS} iterations; a search that is done ends before the last:",
      *columns.aligned(rows),
    ]
  if left:
    lines.append(f"Not timed, as they do not iterate: {', '.join(left)}.")
  return lines


def _observations(
  config: Config,
  built: setting.Setting,
  model: Model,
  shape: attacks.Work,
  most: int,
) -> Observation:
  """Undefended updates of training images, as many as are attacked at once."""
  devices = list(built.mesh.local_devices)
  count = min(len(devices) * attacks.default_width(devices[0]), most)
  params = built.model.init(setting.key(config, setting.WEIGHTS))
  x, y = built.data.x_train, built.data.y_train
  rate = jnp.float32(built.rates.client(0))
  update = jax.jit(
    functools.partial(attacks.simulate, model, epochs=shape.epochs)
  )
  seen = []
  for i in range(count):
    rows = (i * shape.images + np.arange(shape.images)) % len(x)
    labels = jnp.asarray(y[rows], jnp.int32).reshape(shape.steps, shape.batch)
    seen.append(
      Observation(
        params=params,
        update=update(
          params, shape.batches(jnp.asarray(x[rows] / 255.0)), labels, rate
        ),
        bins=None,
        labels=labels if config.labels_known else None,
        learning_rate=rate,
      )
    )
  return jax.tree.map(lambda *leaves: np.stack(leaves), *seen)


def _device_peak() -> str:
  found = [
    (device.memory_stats() or {}).get("peak_bytes_in_use")
    for device in jax.local_devices()
  ]
  known = [peak for peak in found if peak is not None]
  return f"{max(known) / 2**20:,.0f} MB" if known else "it keeps no count"
