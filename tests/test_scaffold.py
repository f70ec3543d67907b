"""SCAFFOLD against its algorithm in NumPy, in limits, and over a lossy wire."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mpqfl_jax import codecs, local, precision, transforms, wire
from mpqfl_jax.types import ClientResult, Cohort, Model
from tests import small

# Client i minimises a_i / 2 (x - b_i)^2; SIZES tells it apart by its offset.
WEIGHT = np.array([3, 1, 2])
OFFSET = np.array([0, 3, 4])
CURVATURE = np.array([[2.0, 0.5], [0.2, 2.0], [0.7, 0.1]])
MINIMUM = np.array([[1.0, -2.0], [4.0, 0.5], [-3.0, 1.5]])
RATE, STEPS, SERVER_RATE = 0.4, 5, 0.8
NOBODY = jnp.full(1, -1, jnp.int32)


def _model() -> Model:
  def init(key):
    del key
    return {"x": jnp.zeros(2)}

  return Model(
    "quadratic", init, lambda p, x: x, (1, 1, 1), 1, *[np.ones(1)] * 2
  )


def _quadratic(params, examples, offset, size, key, rate, drift=None):
  del examples, size, key
  which = jnp.searchsorted(jnp.asarray(OFFSET), offset)
  a, b = jnp.asarray(CURVATURE)[which], jnp.asarray(MINIMUM)[which]
  extra = 0.0 if drift is None else drift["x"]
  x = params["x"]
  for _ in range(STEPS):
    x = x - rate * (a * (x - b) + extra)
  return ClientResult({"x": params["x"] - x}, jnp.float32(0), jnp.int32(STEPS))


def _cohort(ids):
  ids = np.asarray(ids)
  places = (ids, OFFSET[ids], WEIGHT[ids])
  return Cohort._make(jnp.asarray(p, jnp.int32) for p in places)


def _run(cohorts, scaffold=True, **options):
  algorithm = small.algorithm(
    _quadratic,
    net=_model(),
    sizes=WEIGHT,
    client_lr=RATE,
    scaffold=scaffold,
    **{"server": ("sgd", SERVER_RATE), **options},
  )
  state = algorithm.init(jax.random.key(0))
  reports = []
  for r, ids in enumerate(cohorts):
    state, aux = algorithm.round(
      state,
      small.examples(),
      _cohort(ids),
      NOBODY,
      jax.random.fold_in(jax.random.key(1), r),
    )
    reports.append(aux)
  server, held = state
  variates = np.asarray(held.variate["x"]) if scaffold else None
  return server, variates, reports


def test_algorithm_1_line_by_line():
  """Karimireddy et al. 2020, algorithm 1, option II, clients weighted."""
  cohorts = [[0, 1], [2, 0], [1, 2], [0, 2], [2, 1]]
  x, c, ci = np.zeros(2), np.zeros(2), np.zeros((3, 2))
  for cohort in cohorts:
    moves, changes = [], []
    for i in cohort:
      y = x.copy()
      for _ in range(STEPS):
        gradient = CURVATURE[i] * (y - MINIMUM[i])
        y -= RATE * (gradient - ci[i] + c)
      new = ci[i] - c + (x - y) / (STEPS * RATE)
      moves.append(y - x)
      changes.append(new - ci[i])
      ci[i] = new
    w = WEIGHT[cohort]
    c_before = c.copy()
    x = x + SERVER_RATE * np.average(moves, axis=0, weights=w)
    c = c + w.sum() / WEIGHT.sum() * np.average(changes, axis=0, weights=w)
    assert np.any(c != c_before)
  server, variates, _ = _run(cohorts)
  np.testing.assert_allclose(server.params["x"], x, rtol=1e-4)
  np.testing.assert_allclose(server.variate["x"], c, rtol=1e-4)
  np.testing.assert_allclose(variates, ci, rtol=1e-4, atol=1e-6)


def test_drift_is_gone():
  """FedAvg ends where its own fixed point is, SCAFFOLD at the minimum."""
  w = WEIGHT[:, None] / WEIGHT.sum()
  minimum = (w * CURVATURE * MINIMUM).sum(0) / (w * CURVATURE).sum(0)
  # K steps shrink the distance to b_i by (1 - rate a_i)^K.
  pull = w * (1 - (1 - RATE * CURVATURE) ** STEPS)
  fixed_point = (pull * MINIMUM).sum(0) / pull.sum(0)
  assert np.abs(minimum - fixed_point).max() > 0.2
  everyone = [[0, 1, 2]] * 60
  drifted, _, _ = _run(everyone, scaffold=False)
  np.testing.assert_allclose(drifted.params["x"], fixed_point, rtol=1e-3)
  for cohorts in (everyone, [[r % 3, (r + 1) % 3] for r in range(150)]):
    server, variates, _ = _run(cohorts)
    np.testing.assert_allclose(server.params["x"], minimum, rtol=1e-3)
    np.testing.assert_allclose(
      variates, CURVATURE * (minimum - MINIMUM), atol=5e-3
    )


@pytest.mark.parametrize("codec", ["none", "int4", "topk"])
def test_the_servers_variate_is_the_mean_of_the_clients(codec):
  cohorts = [[0, 1], [2, 0], [1, 2], [0, 1, 2], [2, 0]]
  server, variates, reports = _run(cohorts, codec=codec, dropout=0.3)
  arrived = np.concatenate([r.clients.arrived for r in reports])
  assert 0 < arrived.sum() < len(arrived)
  mean = np.average(variates, axis=0, weights=WEIGHT)
  np.testing.assert_allclose(server.variate["x"], mean, rtol=1e-5, atol=1e-6)
  assert np.any(variates)


def test_noise_goes_into_the_variate_as_well():
  """The second message is a function of the first and of public values."""
  noisy = transforms.gaussian_noise(0.5)
  clean, _, _ = _run([[0, 1, 2]], transform=None)
  server, variates, _ = _run([[0]], transform=noisy)
  sent = (0 - np.asarray(server.params["x"])) / SERVER_RATE
  np.testing.assert_allclose(variates[0], sent / (STEPS * RATE), rtol=1e-5)
  exact = CURVATURE[0] * MINIMUM[0]
  assert np.all(np.abs(variates[0]) != np.abs(exact))
  assert np.any(clean.params["x"] != server.params["x"])


@functools.cache
def _linear(scaffold, cohorts, **options):
  schedule = local.Schedule(batch_size=3, max_examples=10, epochs=2)
  training = local.sgd(small.model(), optax.sgd, schedule)
  algorithm = small.algorithm(training, scaffold=scaffold, **options)
  state = algorithm.init(jax.random.key(0))
  for r, ids in enumerate(cohorts):
    state, aux = algorithm.round(
      state,
      small.examples(),
      small.cohort(list(ids)),
      NOBODY,
      jax.random.fold_in(jax.random.key(1), r),
    )
  return state, aux


def _assert_close(a, b, atol):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(x, y, atol=atol)


def test_the_first_round_is_fed_avgs():
  (scaffold, _), _ = _linear(True, ((0, 2, 5),), codec="int4")
  (fed_avg, _), _ = _linear(False, ((0, 2, 5),), codec="int4")
  _assert_close(scaffold.params, fed_avg.params, atol=1e-7)


def test_plans_agree_and_drift_moves_later_rounds():
  cohorts = ((0, 2, 5), (2, 9, 5, 3), (0, 9, 2))
  (one, states), aux = _linear(True, cohorts)
  (many, again), _ = _linear(True, cohorts, plan="chunk(size=2)", devices=2)
  _assert_close((one, states), (many, again), atol=1e-6)
  (fed_avg, _), fed_avg_aux = _linear(False, cohorts)
  gap = one.params["dense1"]["kernel"] - fed_avg.params["dense1"]["kernel"]
  assert np.abs(gap).max() > 1e-3
  alone = np.asarray(fed_avg_aux.clients.uplink_bytes)
  sent = np.asarray(aux.clients.uplink_bytes)
  assert np.all(sent == 2 * alone + wire.LENGTH.size)
  assert aux.downlink_bytes == 2 * fed_avg_aux.downlink_bytes + 4


@pytest.mark.parametrize("name", ["none", "mixed_random", "prune", "int4"])
def test_a_pair_crosses_the_wire(name):
  params = small.model().init(jax.random.key(0))
  other = jax.tree.map(lambda p: 0.5 - 2 * p, params)
  alone = precision.make(name, params)
  codec = codecs.pair(alone)
  payload, _ = codec.encode(
    jax.random.key(1), (params, other), codec.init(params)
  )
  message = codec.pack(jax.device_get(payload))
  assert len(message) == int(codec.num_bytes(payload))
  again = codec.unpack(message)
  first, second = codec.decode(again)
  _assert_close((first, second), codec.decode(payload), atol=0)
  single, _ = alone.encode(jax.random.key(1), params, alone.init(params))
  _assert_close(first, alone.decode(single), atol=0)
  sizes = [record.num_bytes for record in codec.records(payload)]
  assert sum(sizes) + 2 * wire.OVERHEAD + wire.LENGTH.size == len(message)
  known = codec.bins(payload)
  for low, high, value in zip(
    *map(jax.tree.leaves, (known.lower, known.upper, (params, other))),
    strict=True,
  ):
    assert np.all((low <= value + 1e-6) & (value - 1e-6 <= high))


def test_a_damaged_pair_is_refused():
  params = small.model().init(jax.random.key(0))
  codec = codecs.pair(precision.make("int4", params))
  payload, _ = codec.encode(
    jax.random.key(1), (params, params), codec.init(params)
  )
  message = codec.pack(jax.device_get(payload))
  for length in range(len(message)):
    with pytest.raises(wire.WireError):
      codec.unpack(message[:length])
  for i in range(len(message)):
    damaged = bytearray(message)
    damaged[i] ^= 0x40
    with pytest.raises(wire.WireError):
      codec.unpack(bytes(damaged))
  with pytest.raises(wire.WireError):
    codec.unpack(message + b"\0")
