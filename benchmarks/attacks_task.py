"""What attacks are measured on: a model, its weights, test images' updates."""

import numpy as np


def make(name: str, dataset: str, seed: int, conv: str | None = None):
  """The model of a name, its initial weights, and the data set.

  Args:
    name: of the model.
    dataset: an embedded one.
    seed: of the weights.
    conv: the form of convolutions; default `layers.ATTACK_FORM`.
  """
  import jax

  from mpqfl_jax import datasets, layers, models

  data = datasets.load(dataset)
  model = models.make(
    name,
    data.x_train.shape[1:],
    len(data.class_names),
    data.mean,
    data.std,
    conv=conv or layers.ATTACK_FORM,
  )
  return model, model.init(jax.random.key(seed)), data


def updates(model, params, x: np.ndarray, y: np.ndarray):
  """The update of one step at rate 1 on each image, that is its gradient."""
  import jax
  import jax.numpy as jnp

  from mpqfl_jax import attacks

  one = jax.jit(lambda x, y: attacks.simulate(model, params, x, y, 1.0))
  each = [
    one(image[None, None], jnp.asarray(label)[None, None])
    for image, label in zip(x, y, strict=True)
  ]
  return jax.tree.map(lambda *a: np.stack(a), *each)


def observed(model, params, x: np.ndarray, y: np.ndarray, labels_known: bool):
  """What `attacks.run` is given of these updates."""
  import jax
  import jax.numpy as jnp

  from mpqfl_jax.types import Observation

  n = len(x)
  return Observation(
    jax.tree.map(lambda a: np.broadcast_to(a, (n, *a.shape)), params),
    updates(model, params, x, y),
    None,
    jnp.asarray(y, jnp.int32)[:, None, None] if labels_known else None,
    jnp.ones(n),
  )
