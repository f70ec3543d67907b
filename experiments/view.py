"""What an attacker knows of an update that the server kept, and the truth."""

from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments import observations, setting
from experiments.config import Config
from mpqfl_jax import defenses, trees
from mpqfl_jax.types import Bins, Observation, Update

# Images that an attack's prior is fitted to: at most, and for a first check.
MAX_AUXILIARY = 20_000
FEW_AUXILIARY = 200


def _pixels(built: setting.Setting, w: observations.Watched) -> np.ndarray:
  x = built.data.x_train if w.split == "train" else built.data.x_test
  return np.asarray(x[w.rows])


def truth(
  built: setting.Setting, w: observations.Watched
) -> tuple[np.ndarray, np.ndarray]:
  """The images behind an update, float32 in [0, 1], and their labels."""
  y = built.data.y_train if w.split == "train" else built.data.y_test
  return _pixels(built, w).astype(np.float32) / 255.0, np.asarray(y[w.rows])


def auxiliary_images(
  built: setting.Setting, watched: Sequence[observations.Watched]
) -> np.ndarray:
  """As `images_beside`, the watched updates' images left out."""
  return images_beside(
    built.data.x_train, [x for w in watched for x in _pixels(built, w)]
  )


def images_beside(x: np.ndarray, left_out: Iterable[np.ndarray]) -> np.ndarray:
  """Training images, none of which is an attacked one, for an attack's prior.

  Args:
    x: [n, height, width, channels] uint8, the training split.
    left_out: images of it or of others.

  Returns:
    [at most MAX_AUXILIARY, height, width, channels] uint8.
  """
  attacked = {image.tobytes() for image in left_out}
  # By content, because data sets hold some images twice.
  first = x[: MAX_AUXILIARY + len(attacked)]
  free = [i for i, image in enumerate(first) if image.tobytes() not in attacked]
  return np.asarray(x[free[:MAX_AUXILIARY]])


def observe(
  config: Config,
  w: observations.Watched,
  knowledge: str,
  labels: np.ndarray,
) -> Observation:
  """What the attacker sees of an update, by what it knows.

  Args:
    config: the run's.
    w: what the server kept.
    knowledge: `blind` or `adaptive`.
    labels: the true ones, given away where the config says so.
  """
  codec = w.defense.codec
  payload = codec.unpack(w.message)
  update = codec.decode(payload)
  bins = clips = mixing = None
  if knowledge == "adaptive":
    work = w.shape
    bins = defenses.bins(
      w.defense,
      payload,
      w.learning_rate,
      work.steps * work.epochs,
      work.batch,
    )
    mixing = None if w.mixing is None else jnp.asarray(w.mixing)
    clips = defenses.clips(w.defense, w.learning_rate, work.single)
  if w.variates is not None:
    update, bins = without_drift(w, update, bins)
    # The drift was clipped with the rest.
    clips = None
  return Observation(
    params=w.params,
    update=update,
    bins=bins,
    labels=jnp.asarray(labels.reshape(w.shape[:2]))
    if config.labels_known
    else None,
    learning_rate=jnp.float32(w.learning_rate),
    clips=clips,
    mixing=mixing,
  )


def without_drift(
  w: observations.Watched, pair: tuple[Update, Update], bins: Bins | None
) -> tuple[Update, Bins | None]:
  """What SCAFFOLD's two messages say of the gradients alone.

  The server knows both control variates and takes the drift that they add in
  every step out again. The change of the variate is the update once more, over
  the steps and their size, so that an adversary who knows the codec bounds an
  entry from both messages. That the drift moved the points at which the later
  of several steps took their gradients is left to the attack's own model, which
  has none.

  Args:
    w: what the server kept.
    pair: the decoded update and change of the variate.
    bins: of both; None for a blind adversary.

  Returns:
    The update without drift, and its bins.
  """
  assert w.variates is not None
  server, own = w.variates
  way = np.float32(w.shape.steps * w.shape.epochs * w.learning_rate)
  known = jax.tree.map(lambda c, ci: way * (c - ci), server, own)
  update = trees.subtract(pair[0], known)
  if bins is None:
    return update, None

  def both(stochastic, low, high, again_low, again_high, c, drift):
    if not stochastic:  # else the ends are the values that it was drawn from
      left = jnp.maximum(low, way * (again_low + c))
      right = jnp.minimum(high, way * (again_high + c))
      # Where float32 rounding leaves nothing in between, the first will do.
      some = left <= right
      low, high = jnp.where(some, left, low), jnp.where(some, right, high)
    return low - drift, high - drift

  ends = jax.tree.map(
    both,
    bins.stochastic[0],
    bins.lower[0],
    bins.upper[0],
    bins.lower[1],
    bins.upper[1],
    server,
    known,
  )
  lower, upper = jax.tree.transpose(
    jax.tree.structure(known), jax.tree.structure((0, 0)), ends
  )

  def error(low, high, first, second):
    either = jnp.where(jnp.isfinite(first), first, way**2 * second)
    return jnp.where(low == high, 0.0, either)

  variance = jax.tree.map(
    error, lower, upper, bins.variance[0], bins.variance[1]
  )
  return update, Bins(lower, upper, variance, bins.stochastic[0])


def channel_of(w: observations.Watched):
  """The defence as an attacker who knows it can apply it to own updates.

  A client's state of its codec or transform, such as error feedback, is not
  known to it: it takes that of a first round.
  """
  transform, codec = w.defense.transform, w.defense.codec

  def channel(key, update):
    noise, rounding = jax.random.split(key)
    update, _ = transform.apply(noise, update, transform.init(w.params))
    payload, _ = codec.encode(rounding, update, codec.init(w.params))
    return codec.decode(payload)

  return channel
