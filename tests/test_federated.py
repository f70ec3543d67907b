"""Whole rounds: limits in which one algorithm is another, server optimisers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mpqfl_jax import errors, federated, local
from tests import small

NOBODY = jnp.full(1, -1, jnp.int32)


def _rounds(training, number=3, client_lr=0.5, **options):
  algorithm = small.algorithm(training, client_lr=client_lr, **options)
  state = algorithm.init(jax.random.key(0))
  path = [state[0].params]
  for r in range(number):
    state, _ = algorithm.round(
      state,
      small.examples(),
      small.cohort(range(len(small.SIZES))),
      NOBODY,
      jax.random.fold_in(jax.random.key(1), r),
    )
    path.append(state[0].params)
  return path


def _assert_close(a, b, atol=1e-6):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(x, y, atol=atol)


def _central(learning_rate, number=3):
  """Gradient descent on all examples at once."""
  model, data = small.model(), small.examples()
  x = data.x.astype(jnp.float32) / 255
  params = model.init(jax.random.key(0))
  path = [params]
  for _ in range(number):
    grad = jax.grad(
      lambda p: optax.softmax_cross_entropy_with_integer_labels(
        model.apply(p, x), data.y
      ).mean()
    )(params)
    params = jax.tree.map(lambda p, g: p - learning_rate * g, params, grad)
    path.append(params)
  return path


def test_fed_sgd_of_everyone_is_gradient_descent():
  schedule = local.Schedule(batch_size=3, max_examples=10)
  path = _rounds(local.gradient(small.model(), schedule))
  _assert_close(path, _central(0.5))


def test_fed_avg_of_one_full_batch_step_is_fed_sgd():
  schedule = local.Schedule(batch_size=10, max_examples=10)
  path = _rounds(local.sgd(small.model(), optax.sgd, schedule))
  _assert_close(path, _central(0.5))


def test_fed_prox_without_weight_is_fed_avg():
  schedule = local.Schedule(batch_size=3, max_examples=10, epochs=2)
  model = small.model()
  _assert_close(
    _rounds(local.sgd(model, optax.sgd, schedule, prox_mu=0.0)),
    _rounds(local.sgd(model, optax.sgd, schedule)),
    atol=0,
  )


def test_the_proximal_term_in_closed_form():
  # One example, full batches: with d = params - local, each step adds
  # rate * (gradient at the local model - mu d) to d.
  mu, rate, client = 0.7, 0.5, 1
  schedule = local.Schedule(batch_size=3, max_examples=10, steps=3)
  model, data = small.model(), small.examples()
  params = model.init(jax.random.key(0))
  row = int(data.order[small.OFFSETS[client]])
  x = data.x[row : row + 1].astype(jnp.float32) / 255

  def loss(p):
    return optax.softmax_cross_entropy_with_integer_labels(
      model.apply(p, x), data.y[row : row + 1]
    ).mean()

  moved = jax.tree.map(jnp.zeros_like, params)
  for _ in range(3):
    here = jax.tree.map(lambda p, d: p - d, params, moved)
    moved = jax.tree.map(
      lambda d, g: d + rate * (g - mu * d), moved, jax.grad(loss)(here)
    )
  training = local.sgd(model, optax.sgd, schedule, prox_mu=mu)
  result = jax.jit(training)(
    params,
    data,
    jnp.int32(small.OFFSETS[client]),
    jnp.int32(1),
    jax.random.key(0),
    rate,
  )
  _assert_close(result.update, moved)


@pytest.mark.parametrize("name", list(federated.SERVER_OPTIMIZERS))
def test_first_server_step_in_closed_form(name):
  # From Reddi et al. 2021, algorithm 2, with optax's bias correction: m-hat is
  # the update d and v-hat its square; Adagrad adds the square, too.
  schedule = local.Schedule(batch_size=10, max_examples=10)
  training = local.gradient(small.model(), schedule)
  mean = jax.tree.map(
    lambda a, b: np.asarray(a - b, np.float64), *_rounds(training, 1)
  )
  got = _rounds(training, 1, server=(name, 0.1))
  change = jax.tree.map(lambda a, b: np.asarray(a - b), *got)

  def want(d):
    if name in ("sgd", "momentum"):
      return 0.1 * d
    if name == "yogi":
      # Zaheer et al. 2018: v starts at 1e-6, and m at 1e-6 in optax.
      m = 0.9 * 1e-6 + 0.1 * d
      v = 1e-6 - 0.01 * np.sign(1e-6 - d**2) * d**2
      return 0.1 * (m / 0.1) / (np.sqrt(v / 0.01) + 1e-3)
    if name == "adagrad":
      return 0.1 * d / np.sqrt(d**2 + 1e-3)
    return 0.1 * d / (np.abs(d) + 1e-3)

  _assert_close(change, jax.tree.map(want, mean), atol=2e-4)


def test_unknown_server_optimizer_names_the_nearest():
  with pytest.raises(errors.UserError, match="Did you mean 'adam'"):
    federated.server_optimizer("adm")
