"""The task `attack`: the updates of given images, inverted without training."""

import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import adversary, observations, setting, summary
from experiments.config import Config, images
from mpqfl_jax import attacks, encrypted, federated
from mpqfl_jax.defenses import Defense
from mpqfl_jax.types import Cohort, Examples


def run(
  config: Config, built: setting.Setting, run_dir: pathlib.Path
) -> dict[str, Any]:
  """Each update is one client's, at the initial weights, over the wire.

  Args:
    config: the run's.
    built: what its defences share; its clients hold the attacked images.
    run_dir: the run's folder.

  Returns:
    What `summary.json` holds.
  """
  begin = time.perf_counter()
  sent, _ = broadcast(config, built)
  watched: list[observations.Watched] = []
  entries: dict[str, dict[str, Any]] = {}
  for defense in built.defenses:
    start = time.perf_counter()
    mine, lengths = updates(config, built, defense, sent)
    watched += mine
    entries[defense.spec] = {
      "test_accuracy": None,
      "final_params_sha256": summary.params_sha256(sent.params),
      "uplink_bytes_per_client": float(np.mean(lengths)),
      **summary.guarantee(defense, built.protocol.ledger, config.delta),
      "seconds": time.perf_counter() - start,
      "compile_seconds": 0.0,
    }
  found, references = adversary.attack_all(config, built, watched, run_dir)
  for spec, entry in entries.items():
    entry["attacks"] = found.get(spec, {})
  return summary.of_run(config, entries, references, built.float32_bytes, begin)


def broadcast(
  config: Config, built: setting.Setting
) -> tuple[federated.Broadcast, int]:
  """What the clients start from, at the initial weights, and its bytes."""
  params = built.model.init(setting.key(config, setting.WEIGHTS))
  # The clients start from what the downlink's codec makes of the model; control
  # variates, where there are any, are still zero.
  params, variate, size = federated.broadcast(
    built.downlink,
    params,
    jax.tree.map(jnp.zeros_like, params)
    if config.algorithm == "scaffold"
    else (),
    setting.key(config, setting.DOWNLINK),
  )
  sent = federated.Broadcast(
    params, variate, jnp.float32(built.rates.client(0))
  )
  return sent, int(size)


def attacked_shapes(
  config: Config, built: setting.Setting
) -> set[attacks.Work]:
  """Steps, images in each and epochs of the updates that will be attacked."""
  sizes = {int(size) for size in built.clients.sizes}
  shapes = (setting.update_shape(config, built.schedule, n) for n in sizes)
  return {shape for shape in shapes if shape is not None}


def updates(
  config: Config,
  built: setting.Setting,
  defense: Defense,
  sent: federated.Broadcast,
) -> tuple[list[observations.Watched], list[int]]:
  """The updates as the server has them, and their lengths on the wire."""
  split = images(config.attack_images)[0]
  data = built.data
  x, y = (
    (data.x_train, data.y_train)
    if split == "train"
    else (data.x_test, data.y_test)
  )
  order = built.clients.order
  # Only the attacked images go to the device.
  examples = Examples(
    jnp.asarray(x[order]),
    jnp.asarray(y[order], jnp.int32),
    jnp.arange(len(order), dtype=jnp.int32),
  )
  client_side = federated.client(
    setting.training(config, built, defense),
    defense.transform,
    defense.codec,
    scaffold=config.algorithm == "scaffold",
  )
  turn = jax.jit(client_side.turn)
  key = setting.key(config, setting.ROUNDS)
  state = client_side.init(sent.params)
  kept, lengths = [], []
  for client in range(built.clients.num_clients):
    offset = int(built.clients.offsets[client])
    size = int(built.clients.sizes[client])
    shape = setting.update_shape(config, built.schedule, size)
    assert shape is not None  # setting.build made whole updates
    who = Cohort(jnp.int32(client), jnp.int32(offset), jnp.int32(size))
    out = turn(sent, examples, who, state, key)
    rows = observations.visited(
      built.schedule,
      np.arange(len(order)),
      key,
      client,
      offset,
      size,
      shape,
    )
    if defense.encryption is None:
      message = defense.codec.pack(jax.device_get(out.payload))
      lengths.append(len(message))
    else:
      seen = encrypted.seen_alone(
        defense.encryption, jax.device_get(out.update), key, client
      )
      message = observations.message(defense, seen)
      lengths.append(len(seen.message))
    kept.append(
      observations.Watched(
        defense=defense,
        round=0,
        client=client,
        params=jax.device_get(sent.params),
        message=message,
        split=split,
        rows=order[rows],
        shape=shape,
        learning_rate=float(sent.learning_rate),
        variates=jax.device_get((sent.variate, state.variate))
        if client_side.scaffold
        else None,
        mixing=observations.mixing(defense, key, client, shape),
      )
    )
  return kept, lengths
