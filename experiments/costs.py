"""The task `costs`: what a defence costs a client, the server and the wire.

One client of median size, at the initial weights, outside of any round: its
training, what the defence does to the update until it is bytes, and what the
server does with those bytes. Times are wall-clock, on one device, the least of
several repetitions; compiling is left out.
"""

from collections.abc import Callable
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from experiments import attack, folder, setting, summary
from experiments.config import Config
from mpqfl_jax import encrypted, errors, federated, trees
from mpqfl_jax.defenses import Defense
from mpqfl_jax.types import Cohort, PyTree, Update

# A function is repeated this often at least, and for this long.
_REPEATS, _SECONDS = 5, 0.3


def run(
  config: Config, built: setting.Setting, run_dir: pathlib.Path
) -> dict[str, Any]:
  """Measures every defence; `costs.jsonl` has a line for each.

  Args:
    config: the run's.
    built: what its defences share.
    run_dir: the run's folder.

  Returns:
    What `summary.json` holds.
  """
  begin = time.perf_counter()
  sent, downlink_bytes = attack.broadcast(config, built)
  path = run_dir / "costs.jsonl"
  path.unlink(missing_ok=True)
  entries: dict[str, dict[str, Any]] = {}
  bar = tqdm.tqdm(built.defenses, desc="costs", leave=None, disable=None)
  for defense in bar:
    line = {
      "dataset": config.dataset,
      "model": config.model,
      "defense": defense.spec,
      **_measure(config, built, defense, sent, downlink_bytes),
    }
    folder.append_line(path, line)
    entries[defense.spec] = {
      "test_accuracy": None,
      "final_params_sha256": summary.params_sha256(sent.params),
      "uplink_bytes_per_client": float(line["uplink_bytes"]),
      **summary.guarantee(defense, built.protocol.ledger, config.delta),
      "compile_seconds": 0.0,
      "costs": line,
    }
  return summary.of_run(config, entries, {}, built.float32_bytes, begin)


def _measure(
  config: Config,
  built: setting.Setting,
  defense: Defense,
  sent: federated.Broadcast,
  downlink_bytes: int,
) -> dict[str, Any]:
  examples, who = setting.alone(built, _median_client(built))
  keys = federated.client_keys(setting.key(config, setting.ROUNDS), 0)
  training = setting.training(config, built, defense)

  @jax.jit
  def train(params, examples):
    return training(
      params,
      examples,
      who.offset,
      who.size,
      keys.batches,
      sent.learning_rate,
      None,
    ).update

  transform, state = defense.transform, defense.transform.init(sent.params)

  @jax.jit
  def protect(update):
    return transform.apply(keys.noise, update, state)[0]

  raw, train_seconds = _timed(lambda: train(sent.params, examples))
  common = {
    "examples": int(who.size),
    "train_seconds": train_seconds,
  }
  if defense.encryption is not None:
    update, seconds = _timed(lambda: protect(raw))
    found = _encrypted(config, defense.encryption, update, downlink_bytes)
    found["send_seconds"] += seconds
  else:
    found = _readable(defense, protect, raw, sent, downlink_bytes)
  return {**common, **found, "keys": _keys(config, defense)}


def _median_client(built: setting.Setting) -> int:
  order = np.argsort(built.clients.sizes, kind="stable")
  return int(order[len(order) // 2])


def _readable(
  defense: Defense,
  protect: Callable[[Update], Update],
  raw: Update,
  sent: federated.Broadcast,
  downlink_bytes: int,
) -> dict[str, Any]:
  """An update that the server reads: encode, pack; unpack, decode, add."""
  codec, kept = defense.codec, defense.codec.init(sent.params)
  key = jax.random.key(0)

  @jax.jit
  def encode(update):
    return codec.encode(key, protect(update), kept)[0]

  message, send_seconds = _timed(
    lambda: codec.pack(jax.device_get(encode(raw)))
  )
  central = defense.central

  @jax.jit
  def add(total, payload):
    update = codec.decode(payload)
    if central is not None:
      update, _ = central.contribution(update, jnp.float32(central.clip))
    return trees.add(total, update)

  zeros = jax.tree.map(jnp.zeros_like, sent.params)
  _, server_seconds = _timed(lambda: add(zeros, codec.unpack(message)))
  return {
    "send_seconds": send_seconds,
    "server_seconds": server_seconds,
    "open_seconds": 0.0,
    "uplink_bytes": len(message),
    "downlink_bytes": downlink_bytes,
    "key_holder_bytes": 0,
  }


def _encrypted(
  config: Config,
  chosen: encrypted.Options,
  update: Update,
  downlink_bytes: int,
) -> dict[str, Any]:
  """An update that the server adds as ciphertext."""
  clients = max(chosen.min_clients, min(config.cohort_size, 10))
  protocol = encrypted.protocol(chosen, clients, clients)
  updates = jax.tree.map(
    lambda leaf: np.broadcast_to(leaf, (clients, *leaf.shape)), update
  )
  ids = jnp.arange(clients, dtype=jnp.int32)
  cohort = Cohort(ids, jnp.zeros_like(ids), jnp.ones_like(ids))
  ready = np.ones(clients, bool)
  rounds = [
    protocol.combine(
      updates, ready, ready, cohort, (), downlink_bytes, jax.random.key(0)
    ).costs
    for _ in range(_REPEATS)
  ]

  def least(name: str) -> float:
    return float(min(getattr(each, name) for each in rounds))

  return {
    "send_seconds": least("encrypt_seconds") + least("share_seconds"),
    "server_seconds": least("add_seconds") / clients,
    "open_seconds": least("decrypt_seconds"),
    "uplink_bytes": round(rounds[0].message_bytes),
    "downlink_bytes": downlink_bytes + protocol.seal_bytes,
    "key_holder_bytes": rounds[0].key_holder_bytes,
  }


def _keys(config: Config, defense: Defense) -> list[dict[str, Any]]:
  """What making and handing out keys costs, as clients grow."""
  out = []
  for clients in config.scaling_clients:
    made = encrypted.SetUp(0, 0.0, 0)
    if defense.encryption is not None:
      made = encrypted.keys_for(
        defense.encryption, max(clients, defense.encryption.min_clients)
      )
    out.append(
      {
        "clients": clients,
        "pairs": made.key_pairs,
        "seconds": made.key_seconds,
        "bytes": made.key_bytes,
      }
    )
  return out


def encryption(path: str | None) -> list[dict[str, Any]] | None:
  """The rows of `python -m benchmarks.encryption`, which other tasks show.

  Args:
    path: of its file, None where none was given.

  Raises:
    UserError: a file that cannot be read, or is another.
  """
  if path is None:
    return None
  try:
    rows = json.loads(pathlib.Path(path).read_text())
  except (OSError, json.JSONDecodeError) as e:
    raise errors.UserError(
      f"--study_encryption={path}: {e}. Expected the --json file of"
      " python -m benchmarks.encryption."
    ) from e
  wanted = {"scheme", "clients", "key_seconds_total", "key_bytes"}
  if not isinstance(rows, list) or not all(
    isinstance(row, dict) and wanted <= row.keys() for row in rows
  ):
    raise errors.UserError(
      f"--study_encryption={path} is no list of costs with"
      f" {', '.join(sorted(wanted))}."
    )
  return rows


def _timed(fn: Callable[[], PyTree]) -> tuple[PyTree, float]:
  """The result of the first call, and the least seconds of later ones."""
  first = jax.block_until_ready(fn())
  best, spent, count = float("inf"), 0.0, 0
  while count < _REPEATS or spent < _SECONDS:
    start = time.perf_counter()
    jax.block_until_ready(fn())
    taken = time.perf_counter() - start
    best, spent, count = min(best, taken), spent + taken, count + 1
  return first, best
