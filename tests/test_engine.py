"""Plans and devices agree; watching and padding change nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mpqfl_jax import engine, errors, federated, local, precision, transforms
from tests import small

IDS = [3, 9, 0, 1, 7, 10, 4]
NOBODY = jnp.full(2, -1, jnp.int32)


def _training():
  schedule = local.Schedule(batch_size=3, max_examples=10)
  return local.sgd(small.model(), optax.sgd, schedule)


@functools.cache
def _algorithm(plan, devices, **options):
  return small.algorithm(_training(), plan, devices, **options)


def _round(plan="loop", devices=1, ids=IDS, watched=NOBODY, **options):
  algorithm = _algorithm(plan, devices, **options)
  (state, _), aux = algorithm.round(
    algorithm.init(jax.random.key(0)),
    small.examples(),
    small.cohort(ids),
    watched,
    jax.random.key(5),
  )
  return state, aux


def _assert_equal(a, b, atol=0.0):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    if atol:
      np.testing.assert_allclose(x, y, atol=atol)
    else:
      np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def one_at_a_time():
  return {codec: _round(codec=codec) for codec in ("none", "int4", "prune")}


@pytest.mark.parametrize(
  "plan, devices, codec",
  [
    ("loop", 8, "int4"),
    ("loop", 2, "prune"),
    ("vmap", 1, "int4"),
    ("vmap", 2, "none"),
    ("chunk(size=2)", 2, "prune"),
    ("chunk(size=3)", 8, "int4"),
  ],
)
def test_plans_and_devices_agree(plan, devices, codec, one_at_a_time):
  base, base_aux = one_at_a_time[codec]
  state, aux = _round(plan, devices, codec=codec)
  # Codes are equal up to a rounding that falls on a boundary; with these seeds
  # none does, so what remains is the order of the sum.
  _assert_equal(state.params, base.params, atol=1e-6)
  _assert_equal(aux.clients.uplink_bytes, base_aux.clients.uplink_bytes)
  _assert_equal(aux.clients.loss, base_aux.clients.loss, atol=1e-6)


def test_weighted_mean_equals_numpy():
  training = _training()
  params = small.model().init(jax.random.key(0))
  total, weight = None, 0
  for client in IDS:
    batches = federated.client_keys(jax.random.key(5), client).batches
    update = jax.jit(training)(
      params,
      small.examples(),
      jnp.int32(small.OFFSETS[client]),
      jnp.int32(small.SIZES[client]),
      batches,
      0.3,
    ).update
    part = jax.tree.map(
      lambda u: small.SIZES[client] * np.asarray(u, np.float64), update
    )
    total = part if total is None else jax.tree.map(np.add, total, part)
    weight += small.SIZES[client]
  state, _ = _round()
  want = jax.tree.map(lambda p, t: p - t / weight, params, total)
  _assert_equal(state.params, want, atol=1e-6)


def test_a_clients_part_does_not_depend_on_its_place():
  base, _ = _round()
  state, _ = _round(ids=IDS[::-1])
  _assert_equal(state.params, base.params, atol=1e-6)


@pytest.mark.parametrize(
  "plan, devices, codec",
  [
    ("loop", 3, "mixed_random"),
    ("vmap", 3, "sign"),
    ("chunk(size=2)", 1, "int4"),
    ("chunk(size=3)", 3, "none"),
  ],
)
def test_watched_payloads_are_the_clients_own(plan, devices, codec):
  watched = jnp.array([1, 10, -1, 5], jnp.int32)  # 5 is not in the cohort
  _, aux = _round(plan, devices, watched=watched, codec=codec)
  params = small.model().init(jax.random.key(0))
  built = precision.make(codec, params)
  mine = federated.client(_training(), transforms.identity(), built)
  turn = jax.jit(mine.turn)
  for slot, client in ((0, 1), (1, 10)):
    who = jax.tree.map(lambda leaf: leaf[0], small.cohort([client]))
    alone = turn(
      federated.Broadcast(params, (), jnp.float32(0.3)),
      small.examples(),
      who,
      mine.init(params),
      jax.random.key(5),
    )
    sent = jax.tree.map(lambda leaf: leaf[slot], aux.payloads)
    assert built.pack(sent) == built.pack(alone.payload)
  for slot in (2, 3):
    empty = jax.tree.map(lambda leaf: leaf[slot], aux.payloads)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(empty))


@pytest.mark.parametrize("plan", ["loop", "chunk(size=2)"])
def test_watching_changes_no_bit(plan):
  base, _ = _round(plan, 2, codec="mixed_random")
  state, _ = _round(
    plan, 2, watched=jnp.array([1, 9], jnp.int32), codec="mixed_random"
  )
  _assert_equal(state, base)


@pytest.mark.parametrize("plan", ["loop", "chunk(size=3)"])
def test_an_update_that_is_not_finite_is_rejected(plan):
  def apply(key, update, state):
    # Client keys differ, so that a fixed share of them turns bad.
    bad = jax.random.bernoulli(key, 0.5)
    return jax.tree.map(lambda u: jnp.where(bad, jnp.nan, u), update), state

  poison = transforms.identity()._replace(init=lambda params: (), apply=apply)
  state, aux = _round(plan, 2, transform=poison)
  accepted = np.asarray(aux.clients.accepted)
  assert 0 < accepted.sum() < len(IDS)
  kept = [client for client, ok in zip(IDS, accepted, strict=True) if ok]
  clean, _ = _round(plan, 1, ids=kept)
  _assert_equal(state.params, clean.params, atol=1e-6)


def test_a_round_that_nobody_survives_changes_nothing():
  def apply(key, update, state):
    del key
    return jax.tree.map(lambda u: u + jnp.inf, update), state

  poison = transforms.identity()._replace(init=lambda params: (), apply=apply)
  state, aux = _round(transform=poison)
  assert not np.any(aux.clients.accepted)
  _assert_equal(state.params, small.model().init(jax.random.key(0)))


def test_client_state_stays_with_its_client():
  def apply(key, update, state):
    del key
    return update, state + 1

  counter = transforms.identity()._replace(
    init=lambda params: jnp.int32(0), apply=apply
  )
  algorithm = small.algorithm(
    _training(), "chunk(size=2)", 2, transform=counter
  )
  state = algorithm.init(jax.random.key(0))
  for ids in ([3, 9, 0], [9, 1, 2]):
    state, _ = algorithm.round(
      state, small.examples(), small.cohort(ids), NOBODY, jax.random.key(5)
    )
  counts = np.asarray(jax.tree.leaves(state[1])[0])
  assert counts.tolist() == [1, 1, 1, 1, 0, 0, 0, 0, 0, 2, 0]


@pytest.mark.parametrize("plan", ["loop", "chunk(size=3)"])
def test_robust_aggregates_see_every_update(plan):
  """The median of the rounds in which each client is alone."""
  start = small.model().init(jax.random.key(0))
  alone = [
    jax.tree.map(
      lambda a, b: np.asarray(a - b), start, _round(ids=[c])[0].params
    )
    for c in IDS
  ]
  want = jax.tree.map(lambda *u: np.median(np.stack(u), axis=0), *alone)
  state, _ = _round(plan, 2, aggregator="median")
  got = jax.tree.map(lambda a, b: a - b, start, state.params)
  _assert_equal(got, want, atol=1e-6)


def test_who_drops_out_leaves_no_trace():
  def apply(key, update, state):
    del key
    return update, state + 1

  counter = transforms.identity()._replace(
    init=lambda params: jnp.int32(0), apply=apply
  )
  algorithm = small.algorithm(
    _training(), devices=2, dropout=0.5, transform=counter
  )
  (state, states), aux = algorithm.round(
    algorithm.init(jax.random.key(0)),
    small.examples(),
    small.cohort(IDS),
    NOBODY,
    jax.random.key(5),
  )
  arrived = np.asarray(aux.clients.arrived)
  assert 0 < arrived.sum() < len(IDS)
  there = [c for c, ok in zip(IDS, arrived, strict=True) if ok]
  clean, _ = _round(ids=there)
  _assert_equal(state.params, clean.params, atol=1e-6)
  assert np.all((np.asarray(aux.clients.uplink_bytes) > 0) == arrived)
  counts = np.asarray(jax.tree.leaves(states)[0])
  assert sorted(np.flatnonzero(counts)) == sorted(there)


def test_dropout_has_its_rate():
  dropped = 0
  algorithm = small.algorithm(_training(), dropout=0.3)
  state = algorithm.init(jax.random.key(0))
  everyone = small.cohort(range(len(small.SIZES)))
  for r in range(60):
    _, aux = algorithm.round(
      state,
      small.examples(),
      everyone,
      NOBODY,
      jax.random.fold_in(jax.random.key(2), r),
    )
    dropped += int((~aux.clients.arrived).sum())
  n = 60 * len(small.SIZES)
  # Four standard errors: a false alarm in one of 15,000 seeds.
  assert abs(dropped / n - 0.3) < 4 * np.sqrt(0.3 * 0.7 / n)


def test_clients_start_from_the_decoded_broadcast():
  state, aux = _round(downlink="int4")
  params = small.model().init(jax.random.key(0))
  codec = precision.make("int4", params)
  payload, _ = codec.encode(jax.random.key(0), params, codec.init(params))
  decoded = codec.decode(payload)
  _assert_equal(aux.broadcast.params, decoded)
  assert int(aux.downlink_bytes) == len(codec.pack(payload))
  assert any(
    np.any(a != b)
    for a, b in zip(
      jax.tree.leaves(decoded), jax.tree.leaves(params), strict=True
    )
  )
  # The update is relative to the broadcast, the step is the server's own.
  algorithm = small.algorithm(_training())
  server, states = algorithm.init(jax.random.key(0))
  there = server._replace(params=decoded), states
  (moved, _), _ = algorithm.round(
    there, small.examples(), small.cohort(IDS), NOBODY, jax.random.key(5)
  )
  want = jax.tree.map(
    lambda p, d, m: p - (d - m), params, decoded, moved.params
  )
  _assert_equal(state.params, want, atol=1e-6)


def test_evaluate_equals_numpy():
  rng = np.random.default_rng(1)
  x = rng.integers(0, 256, (301, *small.SHAPE)).astype(np.uint8)
  y = rng.integers(0, small.CLASSES, 301).astype(np.int32)
  params = small.model().init(jax.random.key(0))
  logits = np.asarray(small.model().apply(params, x / np.float32(255)), float)
  losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(301), y]
  for devices in (1, 8):
    evaluate = engine.evaluate(small.model(), engine.mesh(devices), x, y)
    loss, accuracy = evaluate(params)
    np.testing.assert_allclose(loss, losses.mean(), rtol=1e-5)
    np.testing.assert_allclose(accuracy, np.mean(logits.argmax(-1) == y))


@pytest.mark.parametrize(
  "spec", ["lop", "chunk(size=0)", "chunk(sise=2)", "chunk(size=two)"]
)
def test_wrong_plans_are_refused(spec):
  with pytest.raises(errors.UserError, match=r"Expected"):
    engine.plan(spec, "cpu")


def test_more_devices_than_there_are():
  with pytest.raises(errors.UserError, match="this machine has 8 cpu"):
    engine.mesh(9)
