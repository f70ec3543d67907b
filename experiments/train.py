"""The task `train`: federated training under each defence, then attacks."""

from collections.abc import Callable
import itertools
import json
import pathlib
import time
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm

from experiments import (
  adversary,
  folder,
  observations,
  setting,
  summary,
  writers,
)
from experiments.config import Config
from mpqfl_jax import (
  accounting,
  attacks,
  checkpoint,
  client_state,
  distributed,
  encrypted,
  engine,
  federated,
  sharding,
  streaming,
)
from mpqfl_jax.defenses import Defense
from mpqfl_jax.types import Cohort, Examples, PyTree, RoundAux


def run(
  config: Config, built: setting.Setting, run_dir: pathlib.Path
) -> dict[str, Any]:
  """Trains under every defence from the same seed, then attacks.

  Args:
    config: the run's.
    built: what its defences share.
    run_dir: the run's folder; every finished round's metrics are in it at any
      time. Of several processes only the main one touches it, and attacks.

  Returns:
    What `summary.json` holds, from the main process.
  """
  begin = time.perf_counter()
  data = built.data
  examples = sharding.put(
    Examples._make(
      (
        np.asarray(data.x_train),
        np.asarray(data.y_train, np.int32),
        built.clients.order.astype(np.int32),
      )
    ),
    built.mesh,
  )
  evaluate = engine.evaluate(
    built.model, built.mesh, np.asarray(data.x_test), data.y_test
  )
  entries: dict[str, dict[str, Any]] = {}
  watched: list[observations.Watched] = []
  for defense in built.defenses:
    entry, kept = _train(config, built, defense, examples, evaluate, run_dir)
    entries[defense.spec] = entry
    watched.extend(kept)
  if not distributed.is_main():
    return {}
  found, references = adversary.attack_all(config, built, watched, run_dir)
  for spec, entry in entries.items():
    entry["attacks"] = found.get(spec, {})
  counts = np.bincount(data.y_test)
  return {
    **summary.of_run(config, entries, references, built.float32_bytes, begin),
    "chance_accuracy": float(counts.max() / counts.sum()),
  }


def choose_watched(
  config: Config, built: setting.Setting, cohort: Cohort, round_number: int
) -> np.ndarray:
  """The clients whose updates the server keeps in this round.

  It picks those of the fewest images, which leak the most.

  Returns:
    [attack_clients] int32 ids, -1 where there is none.
  """
  ids = np.full(config.attack_clients, -1, np.int32)
  if config.attack and round_number in config.attack_rounds:
    order = np.lexsort((cohort.client_id, cohort.size))
    fits = (
      i
      for i in order
      if setting.update_shape(config, built.schedule, int(cohort.size[i]))
    )
    # Not all of a cohort of thousands is asked for a shape.
    fit = list(itertools.islice(fits, config.attack_clients))
    ids[: len(fit)] = cohort.client_id[fit]
  return ids


def attacked_shapes(
  config: Config, built: setting.Setting
) -> set[attacks.Work]:
  """Steps, images in each and epochs of the updates that will be attacked."""
  found: set[attacks.Work] = set()
  for number in config.attack_rounds if config.attack else ():
    cohort = setting.sample(config, built.clients, number)
    ids = choose_watched(config, built, cohort, number)
    for size in cohort.size[np.isin(cohort.client_id, ids)]:
      shape = setting.update_shape(config, built.schedule, int(size))
      assert shape is not None  # choose_watched picked it
      found.add(shape)
  return found


class Progress(NamedTuple):
  """All that a training run carries from round to round, as arrays.

  Attributes:
    state: the server's.
    clients: what the store holds of the clients' states.
    participations: [num_clients] int64, updates that arrived of each client.
    uplink_bytes: [] int64, so far.
    test: [2] float64, last test loss and accuracy.
  """

  state: federated.ServerState
  clients: PyTree
  participations: np.ndarray
  uplink_bytes: np.ndarray
  test: np.ndarray


def _train(
  config: Config,
  built: setting.Setting,
  defense: Defense,
  examples: Examples,
  evaluate: Callable,
  run_dir: pathlib.Path,
) -> tuple[dict[str, Any], list[observations.Watched]]:
  """Trains under one defence, from its newest checkpoint where there is one."""
  place = run_dir / "checkpoints" / folder.slug(defense.spec)
  client = setting.client(
    config, setting.training(config, built, defense), defense
  )
  protocol = None
  if defense.encryption is not None:
    protocol = encrypted.protocol(
      defense.encryption, config.cohort_size, config.num_clients
    )
  algorithm = federated.federated(
    built.model,
    client,
    built.downlink,
    federated.server_optimizer(config.server_optimizer),
    built.rates,
    built.aggregator,
    len(built.clients.order),
    built.plan,
    built.mesh,
    protocol,
  )
  start_state = algorithm.init(setting.key(config, setting.WEIGHTS))
  rows = run_dir / "client_states" / f"{folder.slug(defense.spec)}.rows"
  name, _, _, block = built.places[defense.spec]
  store = client_state.make(
    name,
    client.init(start_state.params),
    config.num_clients,
    built.mesh,
    rows,
  )
  progress = Progress(
    start_state,
    store.init(),
    np.zeros(config.num_clients, np.int64),
    np.zeros((), np.int64),
    np.full(2, np.nan),
  )
  done, kept, finished = 0, [], place / "result.json"
  main = distributed.is_main()
  entry: dict[str, Any] = {}
  if main:
    restored = checkpoint.restore_latest(place, progress, tqdm.tqdm.write)
    if restored is not None:
      done, progress = restored
    folder.keep_lines(
      run_dir / "metrics.jsonl",
      lambda line: line["defense"] != defense.spec or line["round"] <= done,
    )
    kept = observations.load(run_dir, defense, done, built.template)
    if finished.is_file() and done == config.rounds:
      entry = json.loads(finished.read_text())
  # The folder may be on the main process's disk alone.
  start_round, ready, progress = sharding.from_main(
    (np.int64(done), np.bool_(entry), progress)
  )
  done = int(start_round)
  if ready:
    rows.unlink(missing_ok=True)
    return entry, kept
  state = sharding.put(progress.state, built.mesh)
  held = store.open(progress.clients)
  rounds_key = setting.key(config, setting.ROUNDS)
  round_fn, compile_seconds = None, 0.0
  begin = time.perf_counter()
  outlets = writers.make(config, defense.spec, run_dir, done) if main else []
  bar = tqdm.tqdm(
    range(done + 1, config.rounds + 1),
    desc=defense.spec,
    initial=done,
    total=config.rounds,
    unit="round",
    leave=None,  # not under a study's table
    disable=None if main else True,
  )
  for round_number in bar:
    start = time.perf_counter()
    cohort = setting.sample(config, built.clients, round_number)
    ids = choose_watched(config, built, cohort, round_number)
    key = jax.random.fold_in(rounds_key, round_number)
    args = (state, held, examples, cohort, ids, key)
    if round_fn is None:
      if protocol is None:
        round_fn = streaming.compiled(
          algorithm, store, block, built.mesh, *args
        )
      else:
        round_fn = streaming.on_host(algorithm, store, built.mesh)
      compile_seconds = time.perf_counter() - start
      start = time.perf_counter()
    state, held, aux, before = round_fn(*args)
    clients = jax.device_get(aux.clients)
    if main and (ids >= 0).any():
      seen = _keep(
        config, built, defense, cohort, ids, key, aux, before, round_number
      )
      observations.store(run_dir, seen)
      kept += seen
    test = progress.test
    if round_number % config.eval_every == 0 or round_number == config.rounds:
      test = np.asarray(evaluate(state.params), np.float64)
    progress.participations[cohort.client_id] += clients.arrived
    sent = clients.uplink_bytes.sum(dtype=np.int64)
    progress = Progress(
      state, held, progress.participations, progress.uplink_bytes + sent, test
    )
    ledger = accounting.Ledger(round_number, progress.participations)
    epsilon = defense.epsilon(ledger, config.delta)
    bar.set_postfix(summary.postfix(test[1], epsilon))
    if not main:
      continue
    weight = cohort.size * clients.accepted
    encryption = {}
    if aux.encrypted is not None:
      encryption = {"encryption": aux.encrypted.costs._asdict()}
    line = {
      "defense": defense.spec,
      "round": round_number,
      "train_loss": folder.number(
        np.sum(weight * np.where(clients.accepted, clients.loss, 0))
        / max(weight.sum(), 1)
      ),
      "test_loss": folder.number(test[0]),
      "test_accuracy": folder.number(test[1]),
      "uplink_bytes": int(sent),
      "downlink_bytes": int(np.count_nonzero(cohort.size))
      * int(aux.downlink_bytes),
      "participants": int(clients.accepted.sum()),
      "rejected": int((~clients.accepted & clients.arrived).sum()),
      "epsilon": folder.number(epsilon),
      "client_lr": float(built.rates.client(round_number - 1)),
      "server_lr": float(built.rates.server(round_number - 1)),
      "seconds": time.perf_counter() - start,
      **encryption,
    }
    folder.append_line(run_dir / "metrics.jsonl", line)
    for outlet in outlets:
      outlet.write(line)
    due = config.checkpoint_every and (
      round_number % config.checkpoint_every == 0
    )
    if due or round_number == config.rounds:
      store.before_save()
      checkpoint.save(place, round_number, progress)
      store.after_save()
  entry = {
    "test_accuracy": folder.number(progress.test[1]),
    "final_params_sha256": summary.params_sha256(state.params),
    "uplink_bytes_per_client": float(
      progress.uplink_bytes / max(progress.participations.sum(), 1)
    ),
    **summary.guarantee(
      defense,
      accounting.Ledger(config.rounds, progress.participations),
      config.delta,
    ),
    "seconds": time.perf_counter() - begin - compile_seconds,
    "compile_seconds": compile_seconds,
  }
  if main:
    if protocol is not None:
      entry["encryption"] = encrypted.figures(
        protocol.set_up,
        [
          line["encryption"]
          for line in folder.read_lines(run_dir / "metrics.jsonl")
          if line["defense"] == defense.spec
        ],
      )
    folder.write_json(finished, entry)
  store.remove()
  for outlet in outlets:
    outlet.close()
  return entry, kept


def _keep(
  config: Config,
  built: setting.Setting,
  defense: Defense,
  cohort: Cohort,
  ids: np.ndarray,
  key: jax.Array,
  aux: RoundAux,
  before: dict[int, federated.ClientState],
  round_number: int,
) -> list[observations.Watched]:
  """What the server keeps of the watched clients whose updates arrived.

  `before` are their states from before the round.
  """
  sent, payloads = jax.device_get((aux.broadcast, aux.payloads))
  arrived = np.asarray(aux.clients.arrived)
  kept = []
  for slot in np.flatnonzero(ids >= 0):
    client = int(ids[slot])
    place = int(np.flatnonzero(cohort.client_id == client)[0])
    if not arrived[place]:
      continue
    offset, size = int(cohort.offset[place]), int(cohort.size[place])
    shape = setting.update_shape(config, built.schedule, size)
    assert shape is not None  # choose_watched picked it
    rows = observations.visited(
      built.schedule, built.clients.order, key, client, offset, size, shape
    )
    if aux.encrypted is None:
      message = defense.codec.pack(
        jax.tree.map(lambda leaf: leaf[slot], payloads)
      )
    elif client in aux.encrypted.seen:
      message = observations.message(defense, aux.encrypted.seen[client])
    else:
      continue
    kept.append(
      observations.Watched(
        defense=defense,
        round=round_number,
        client=client,
        params=sent.params,
        message=message,
        split="train",
        rows=rows,
        shape=shape,
        learning_rate=float(sent.learning_rate),
        variates=None
        if config.algorithm != "scaffold"
        else (sent.variate, before[client].variate),
        mixing=observations.mixing(defense, key, client, shape),
      )
    )
  return kept
