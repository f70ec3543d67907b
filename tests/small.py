"""A linear classifier and a small population, quick to compile."""

import jax
import jax.numpy as jnp
import numpy as np

from mpqfl_jax import (
  aggregate,
  engine,
  federated,
  local,
  precision,
  transforms,
)
from mpqfl_jax.types import Cohort, Examples, Model

SHAPE, CLASSES = (3, 2, 1), 4
SIZES = np.array([5, 1, 7, 4, 2, 8, 3, 6, 1, 10, 4])
OFFSETS = np.cumsum(SIZES) - SIZES


def model() -> Model:
  def init(key):
    kernel = 0.1 * jax.random.normal(key, (6, CLASSES))
    return {"dense1": {"kernel": kernel, "bias": jnp.zeros(CLASSES)}}

  def apply(params, x):
    layer = params["dense1"]
    return x.reshape(len(x), -1) @ layer["kernel"] + layer["bias"]

  return Model("linear", init, apply, SHAPE, CLASSES, np.zeros(1), np.ones(1))


def examples() -> Examples:
  rng = np.random.default_rng(0)
  n = int(SIZES.sum())
  return Examples(
    jnp.asarray(rng.integers(0, 256, (n, *SHAPE)), jnp.uint8),
    jnp.asarray(rng.integers(0, CLASSES, n), jnp.int32),
    jnp.asarray(rng.permutation(n), jnp.int32),
  )


def cohort(ids) -> Cohort:
  ids = np.asarray(ids)
  return Cohort(
    jnp.asarray(ids, jnp.int32),
    jnp.asarray(OFFSETS[ids], jnp.int32),
    jnp.asarray(SIZES[ids], jnp.int32),
  )


def algorithm(
  training: local.LocalTraining,
  plan: str = "loop",
  devices: int = 1,
  codec: str = "none",
  transform=None,
  server=("sgd", 1.0),
  aggregator: str = "mean",
  dropout: float = 0.0,
  downlink: str = "none",
):
  net = model()
  params = net.init(jax.random.key(0))
  transform = transform or transforms.identity()
  up, down = precision.make(codec, params), precision.make(downlink, params)
  return federated.federated(
    net,
    federated.client_turn(training, transform, up, dropout),
    lambda params: (transform.init(params), up.init(params)),
    down,
    federated.server_optimizer(*server),
    aggregate.make(aggregator),
    len(SIZES),
    engine.plan(plan, "cpu"),
    engine.mesh(devices),
  )
