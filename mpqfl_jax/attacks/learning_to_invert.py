"""Learning to Invert: a network that has seen many updates and their images.

Wu et al. 2023. The adversary knows the model and the defence, so that it can
make as many pairs of images and updates as it likes from auxiliary images, each
with fresh noise of the defence, and train a network to go back. Afterwards an
update costs one pass through the network. Where the defence's randomness is
large, the network learns the posterior mean, which is what minimises the error.

The network is the paper's, three dense layers on the update as a vector, with
three changes. Large leaves are hashed to fewer numbers (as the paper does
for large models). Kernels of dense layers with a bias are first
turned into the layer's input, which is the quotient of their gradients. Images
come out in whitened coordinates fitted to the auxiliary images.
"""

from collections.abc import Callable
import functools
import hashlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mpqfl_jax import errors
from mpqfl_jax.attacks import coordinates, core, objectives
from mpqfl_jax.attacks import labels as labels_lib
from mpqfl_jax.types import Array, Key, Model, Observation, PyTree, Update

# Standardised features beyond this many deviations are cut.
_CUT = 6.0
# Updates that the features' mean and deviation are taken from.
_FIRST = 256
# Training steps between two looks at the host.
_CHUNK = 25


class _Network(NamedTuple):
  """A trained inverter.

  Attributes:
    layers: [(kernel, bias)] of three dense layers.
    mean, deviation: [features], of the training updates.
  """

  layers: PyTree
  mean: Array
  deviation: Array


def _hash(leaf: Array, size: int, seed: int) -> Array:
  """Sums of random groups of entries with random signs, [size].

  Weinberger et al. 2009, with groups of equal size.
  """
  count = -(-leaf.size // size)
  rng = np.random.default_rng(seed)
  order = rng.permutation(count * size).reshape(count, size)
  signs = rng.choice(np.array([-1.0, 1.0], np.float32), order.shape)
  signs[order >= leaf.size] = 0
  return jnp.sum(leaf[np.minimum(order, leaf.size - 1)] * signs, 0)


def features(update: Update, size: int) -> Array:
  """An update as a vector for the network.

  Args:
    update: nested dict of layers.
    size: most numbers that a leaf is turned into.

  Returns:
    [features] float32.
  """
  parts: list[Array] = []

  def add(leaf: Array) -> None:
    leaf = leaf.reshape(-1)
    parts.append(
      leaf if leaf.size <= size else _hash(leaf, size, seed=len(parts))
    )

  def walk(node) -> None:
    if not isinstance(node, dict):
      add(node)
      return
    for name in sorted(node):
      leaf = node[name]
      bias = node.get("bias")
      if name == "kernel" and leaf.ndim == 2 and bias is not None:
        # Scaled, because the squares of a small gradient underflow.
        scale = jnp.max(jnp.abs(bias)) + 1e-30
        error = bias / scale
        add((leaf / scale) @ error / (error @ error + 1e-12))
      else:
        walk(leaf)

  walk(update)
  return jnp.concatenate(parts)


def _forward(layers: PyTree, f: Array) -> Array:
  for kernel, bias in layers[:-1]:
    f = jax.nn.gelu(f @ kernel + bias)
  kernel, bias = layers[-1]
  return f @ kernel + bias


def learning_to_invert(
  model: Model,
  work: core.Work,
  *,
  auxiliary: np.ndarray | None = None,
  iterations: int = 2000,
  restarts: int = 1,
  hidden: int = 1024,
  size: int = 1024,
  training_batch: int = 64,
  learning_rate: float = 1e-3,
) -> core.Direct:
  """Trains a network on auxiliary images and applies it to the update.

  Wu et al. 2023, with a mean squared error over images whose labels
  ascend, as inferred labels do, in place of the minimum over all orders. A
  blind adversary trains on undefended updates, an adaptive one on updates that
  went through the defence. Labels of the training updates are drawn at random:
  auxiliary images come without any. The network is trained once for all updates
  that started from the same parameters under the same defence.

  Args:
    model: the classifier that was attacked.
    work: what the client did.
    auxiliary: [images, height, width, channels] uint8, images of the same kind
      as the client's and disjoint from them.
    iterations: training steps.
    restarts: networks, of which the one whose answer explains the update best
      counts.
    hidden: width of the two hidden layers.
    size: most features of a leaf.
    training_batch: updates in a training step.
    learning_rate: Adam's first rate; it falls by a cosine.

  Raises:
    UserError: no auxiliary images.
  """
  if auxiliary is None:
    raise errors.UserError(
      "attack 'learning_to_invert' needs auxiliary images to learn from; none"
      " were given."
    )
  prior = coordinates.fitted(model.image_shape, np.asarray(auxiliary))
  pool = jnp.asarray(auxiliary)
  inputs = work.images * int(np.prod(model.image_shape))
  optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, iterations))

  def draw(key: Key, params, rate, channel: core.Channel | None):
    """One update as features, and the images behind it."""
    keys = jax.random.split(key, 3)
    rows = jax.random.randint(keys[0], (work.images,), 0, len(pool))
    x = pool[rows].astype(jnp.float32) / 255
    labels = jax.random.randint(
      keys[1], (work.steps, work.batch), 0, model.num_classes
    )
    update = core.simulate(
      model, params, work.batches(x), jnp.sort(labels), rate, work.epochs
    )
    if channel is not None:
      update = channel(keys[2], update)
    return features(update, size), x

  def standardise(f: Array, mean: Array, deviation: Array) -> Array:
    return jnp.clip((f - mean) / deviation, -_CUT, _CUT)

  def images(layers: PyTree, f: Array) -> Array:
    z = _forward(layers, f)
    return prior.to_images(z).reshape(-1, work.images, *model.image_shape)

  def train(
    key: Key,
    params,
    rate,
    channel: core.Channel | None,
    told: Callable[[str], None],
  ) -> _Network:
    many = jax.vmap(functools.partial(draw, channel=channel), (0, None, None))

    @jax.jit
    def first(key, params, rate):
      f, _ = many(jax.random.split(key, _FIRST), params, rate)
      return jnp.mean(f, 0), jnp.std(f, 0) + 1e-6 * jnp.std(f) + 1e-12

    @jax.jit
    def advance(layers, state, key, params, rate, mean, deviation):
      def loss(layers, f, x):
        return jnp.mean(jnp.square(images(layers, f) - x))

      def step(carry, key):
        layers, state = carry
        f, x = many(jax.random.split(key, training_batch), params, rate)
        gradient = jax.grad(loss)(layers, standardise(f, mean, deviation), x)
        change, state = optimizer.update(gradient, state)
        return (optax.apply_updates(layers, change), state), None

      keys = jax.random.split(key, _CHUNK)
      return jax.lax.scan(step, (layers, state), keys)[0]

    keys = jax.random.split(key, 3)
    mean, deviation = first(keys[0], params, rate)
    widths = (len(mean), hidden, hidden, inputs)
    layers = [
      (
        jax.random.normal(k, (a, b)) * np.sqrt((2 if b == hidden else 0.1) / a),
        jnp.zeros(b),
      )
      for k, a, b in zip(
        jax.random.split(keys[1], 3), widths[:-1], widths[1:], strict=True
      )
    ]
    state = optimizer.init(layers)
    for i in range(-(-iterations // _CHUNK)):
      key = jax.random.fold_in(keys[2], i)
      layers, state = advance(layers, state, key, params, rate, mean, deviation)
      told(f"training, step {(i + 1) * _CHUNK} of {iterations}")
    return _Network(layers, mean, deviation)

  @jax.jit
  def apply(network: _Network, observation: Observation):
    f = features(observation.update, size)
    f = standardise(f, network.mean, network.deviation)
    x = jnp.clip(images(network.layers, f[None])[0], 0.0, 1.0)
    labels = observation.labels
    if labels is None:
      labels = labels_lib.infer(model, observation, work)
    update = core.explain(model, observation, x, labels, work)
    distance = objectives.squared(update, observation)
    return x, labels.reshape(work.images), distance

  # The last networks, one a restart: updates of a round come one after another.
  kept: dict[tuple, _Network] = {}

  def solve(observation: Observation, given: core.Help) -> core.Answer:
    channel = given.channel
    if observation.bins is None:
      channel = None
    elif channel is None:
      raise errors.UserError(
        "attack 'learning_to_invert' with knowledge of the codec needs the"
        " defence to train on: give `channel` to attacks.run."
      )
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(observation.params):
      digest.update(np.ascontiguousarray(leaf).tobytes())
    digest.update(np.asarray(observation.learning_rate).tobytes())
    same = (digest.digest(), channel)
    which = (*same, jax.random.key_data(given.key).tobytes())
    steps = 0
    if which not in kept:
      for other in [k for k in kept if k[:2] != same]:
        del kept[other]
      kept[which] = train(
        given.key,
        observation.params,
        observation.learning_rate,
        channel,
        given.told,
      )
      steps = iterations
    x, labels, distance = apply(kept[which], observation)
    return core.Answer(
      np.asarray(x), np.asarray(labels), float(distance), steps
    )

  def check(observation: Observation) -> None:
    core.check_labels(observation, work)
    if observation.labels is None:
      labels_lib.check(observation.params, model, work.images)

  return core.Direct(
    "learning_to_invert", solve, check, work.images, restarts=restarts
  )
