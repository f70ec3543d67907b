"""A client's training against the same thing written out in NumPy."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mpqfl_jax import local
from tests import small

KEY = jax.random.key(7)
RATE = 0.5
MOMENTUM = functools.partial(optax.sgd, momentum=0.9)


def _schedule(**changes):
  values = {"batch_size": 3, "max_examples": 10, "epochs": 2, **changes}
  return local.Schedule(**values)


def _rows(schedule, client, steps):
  rows, mask = schedule.rows(
    KEY,
    jnp.int32(small.OFFSETS[client]),
    jnp.int32(small.SIZES[client]),
    small.examples().order,
    steps,
  )
  return np.asarray(rows), np.asarray(mask)


def _gradient(params, x, y):
  """Mean softmax cross-entropy gradient of the linear model, closed form."""
  logits = x @ params["kernel"] + params["bias"]
  p = np.exp(logits - logits.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  losses = -np.log(p[np.arange(len(y)), y])
  p[np.arange(len(y)), y] -= 1
  grad = {"kernel": x.T @ p / len(y), "bias": p.mean(0)}
  return grad, losses.mean()


def _examples64():
  data = small.examples()
  return np.asarray(data.x, np.float64).reshape(len(data.y), -1) / 255, data


def _run(training, client, drift=None):
  params = small.model().init(jax.random.key(0))
  return jax.jit(training)(
    params,
    small.examples(),
    jnp.int32(small.OFFSETS[client]),
    jnp.int32(small.SIZES[client]),
    KEY,
    RATE,
    drift,
  )


@pytest.mark.parametrize("client", [0, 1, 9])
@pytest.mark.parametrize("epochs", [1, 3])
def test_every_epoch_visits_every_example_once(client, epochs):
  size = small.SIZES[client]
  per_epoch = -(-size // 3)
  rows, mask = _rows(_schedule(epochs=epochs), client, epochs * per_epoch)
  mine = small.examples().order[small.OFFSETS[client] :][:size]
  seen = []
  for epoch in range(epochs):
    part = slice(epoch * per_epoch, (epoch + 1) * per_epoch)
    visited = rows[part][mask[part] > 0]
    assert sorted(visited) == sorted(np.asarray(mine))
    seen.append(tuple(visited))
  if size > 4 and epochs > 1:
    assert len(set(seen)) > 1, "each epoch has an order of its own"


def test_steps_go_on_into_further_epochs():
  client = 0  # five examples: batches of 3 and 2, and again
  rows, mask = _rows(_schedule(steps=5), client, 5)
  assert mask.sum(1).tolist() == [3, 2, 3, 2, 3]
  assert set(rows[:2][mask[:2] > 0]) == set(rows[2:4][mask[2:4] > 0])


@pytest.mark.parametrize("client", [0, 1, 5, 9])
@pytest.mark.parametrize(
  "changes, drift", [({}, 0.0), ({"steps": 4}, 0.0), ({"steps": 4}, 0.2)]
)
def test_sgd_equals_numpy(client, changes, drift):
  schedule = _schedule(**changes)
  steps = int(schedule.num_steps(jnp.int32(small.SIZES[client])))
  rows, mask = _rows(schedule, client, steps)
  x, data = _examples64()
  start = small.model().init(jax.random.key(0))["dense1"]
  here = {k: np.asarray(v, np.float64) for k, v in start.items()}
  total, count = 0.0, 0
  for row, m in zip(rows, mask, strict=True):
    row = row[m > 0]
    grad, loss = _gradient(here, x[row], np.asarray(data.y)[row])
    here = {k: here[k] - 0.5 * (grad[k] + drift) for k in here}
    total, count = total + loss * len(row), count + len(row)
  result = _run(
    local.sgd(small.model(), optax.sgd, schedule),
    client,
    {"dense1": {k: jnp.full(v.shape, drift) for k, v in start.items()}}
    if drift
    else None,
  )
  assert result.steps == steps
  for name in here:
    np.testing.assert_allclose(
      result.update["dense1"][name],
      np.asarray(start[name], np.float64) - here[name],
      atol=2e-6,
    )
  np.testing.assert_allclose(result.loss, total / count, rtol=1e-5)


@pytest.mark.parametrize("client", [1, 5])
def test_gradient_equals_numpy(client):
  x, data = _examples64()
  rows = np.asarray(data.order)[small.OFFSETS[client] :][: small.SIZES[client]]
  params = small.model().init(jax.random.key(0))["dense1"]
  here = {k: np.asarray(v, np.float64) for k, v in params.items()}
  grad, loss = _gradient(here, x[rows], np.asarray(data.y)[rows])
  result = _run(local.gradient(small.model(), _schedule()), client)
  for name in grad:
    np.testing.assert_allclose(
      result.update["dense1"][name], 0.5 * grad[name], atol=1e-6
    )
  np.testing.assert_allclose(result.loss, loss, rtol=1e-5)


def test_populations_of_other_draws_share_a_program():
  def program(largest):
    schedule = _schedule(max_examples=largest)
    rows = jax.jit(lambda *a: schedule.rows(*a, steps=4))
    order = jnp.arange(30)
    return rows.lower(KEY, jnp.int32(0), jnp.int32(9), order).as_text()

  assert program(9) == program(10) == program(16) != program(17)


@pytest.mark.parametrize("kind", ["sgd", "momentum", "gradient"])
def test_padding_changes_nothing(kind):
  # A larger max_examples only adds padding.
  def run(max_examples):
    schedule = _schedule(max_examples=max_examples)
    training = {
      "sgd": lambda: local.sgd(small.model(), optax.sgd, schedule),
      "momentum": lambda: local.sgd(small.model(), MOMENTUM, schedule),
      "gradient": lambda: local.gradient(small.model(), schedule),
    }[kind]()
    params = small.model().init(jax.random.key(0))
    sides = jax.jit(jax.vmap(training, (None, None, 0, 0, None, None)))
    ids = np.array([1, 9])
    return sides(
      params,
      small.examples(),
      jnp.asarray(small.OFFSETS[ids], jnp.int32),
      jnp.asarray(small.SIZES[ids], jnp.int32),
      KEY,
      RATE,
    )

  # Client 1 has one example: beside client 9 it waits for three more steps an
  # epoch, and its batches are two thirds padding.
  beside, alone = (
    run(10),
    _run(
      {
        "sgd": lambda: local.sgd(small.model(), optax.sgd, _schedule()),
        "momentum": lambda: local.sgd(small.model(), MOMENTUM, _schedule()),
        "gradient": lambda: local.gradient(small.model(), _schedule()),
      }[kind](),
      1,
    ),
  )
  for a, b in zip(jax.tree.leaves(beside), jax.tree.leaves(alone), strict=True):
    np.testing.assert_allclose(a[0], b, atol=1e-7)
  chex.assert_trees_all_equal(run(40), beside)


def test_a_client_without_examples_sends_zero():
  schedule = _schedule()
  training = local.sgd(small.model(), optax.sgd, schedule)
  params = small.model().init(jax.random.key(0))
  result = jax.jit(training)(
    params, small.examples(), jnp.int32(0), jnp.int32(0), KEY, RATE
  )
  for leaf in jax.tree.leaves(result.update):
    assert not np.any(leaf)
  assert result.loss == 0
