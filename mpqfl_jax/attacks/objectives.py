"""How well a simulated update explains an observed one, and image priors.

An objective is a function of (simulated update, observation) -> [] float32 and
does not change when the update is scaled: one tolerance serves untrained
and trained weights. Where the observation carries `bins` the objectives use
them: an entry costs nothing inside the interval that the payload proves, and
counts by the inverse of its expected squared error.
"""

import jax
import jax.numpy as jnp

from mpqfl_jax import trees
from mpqfl_jax.types import Array, Observation, Update

# Added to the variance of each leaf, relative to the leaf's mean square: how
# far an exactly known leaf may outweigh a coarse one.
VARIANCE_FLOOR = 1e-4


def as_sent(simulated: Update, observation: Observation) -> Update:
  """The simulated update after the clipping that the adversary knows of."""
  if observation.clips is None:
    return simulated
  return trees.scale(clipped_share(simulated, observation.clips), simulated)


def clipped_share(update: Update, clips: Array) -> Array:
  """To how much of itself clipping scales an update, [] float32 in (0, 1].

  Args:
    update: before clipping.
    clips: as in `Observation`.
  """
  # Smooth at zero, and away from it equal to the norms.
  l1 = trees.l1_norm(update) + 1e-20
  l2 = jnp.sqrt(trees.squared_norm(update) + 1e-30)
  # An infinite limit, divided, would make the gradient NaN.
  share = jnp.where(jnp.isfinite(clips), clips, 0.0) / jnp.stack([l1, l2])
  share = jnp.where(jnp.isfinite(clips), share, 1.0)
  return jnp.minimum(1.0, jnp.min(share))


def residual(simulated: Update, observation: Observation) -> Update:
  """Simulated minus observed update, entry by entry.

  For an adaptive adversary the residual of a deterministically rounded entry is
  its distance from the interval it lay in, with its sign.
  """
  simulated = as_sent(simulated, observation)
  bins = observation.bins
  if bins is None:
    return trees.subtract(simulated, observation.update)

  def leaf(u, v, low, high, stochastic):
    return jnp.where(stochastic, u - v, u - jnp.clip(u, low, high))

  return jax.tree.map(
    leaf, simulated, observation.update, bins.lower, bins.upper, bins.stochastic
  )


def weights(observation: Observation) -> Update:
  """Inverse variance of each entry; 1 for a blind adversary.

  0 outside the layers that the search has its focus on.
  """
  if observation.bins is None:
    found = jax.tree.map(lambda v: jnp.ones((1,) * v.ndim), observation.update)
  else:

    def leaf(v, variance):
      floor = VARIANCE_FLOOR * jnp.mean(jnp.square(v)) + 1e-20
      return 1.0 / (variance + floor)

    found = jax.tree.map(leaf, observation.update, observation.bins.variance)
  if observation.focus is None:
    return found
  return trees_multiply(found, observation.focus)


def _weighted(a: Update, b: Update, w: Update) -> Array:
  return trees.vdot(trees_multiply(a, w), b)


def trees_multiply(a: Update, b: Update) -> Update:
  """Leafwise a * b, broadcasting."""
  return jax.tree.map(jnp.multiply, a, b)


def squared(simulated: Update, observation: Observation) -> Array:
  """Squared distance, relative to the observed update's own square.

  Zhu et al. 2019, equation 4, up to the scale.
  """
  return _relative(residual(simulated, observation), observation)


def _relative(r: Update, observation: Observation) -> Array:
  """Squared length of a residual, relative to the observed update's own."""
  w, observed = weights(observation), observation.update
  return _weighted(r, r, w) / (_weighted(observed, observed, w) + 1e-30)


def squared_and_absolute(
  simulated: Update, observation: Observation, ratio: float = 0.1
) -> Array:
  """Squared plus `ratio` times absolute distance, each relative.

  TAG: Deng et al. 2021, equation 5; the absolute distance counts less from
  layer to layer, in equal steps, as there.
  """
  r = residual(simulated, observation)
  scale = jax.tree.map(jnp.sqrt, weights(observation))
  names = [name.split("/")[0] for name in trees.leaf_names(r)]
  order = {name: i for i, name in enumerate(dict.fromkeys(names))}
  absolute, reference = jnp.float32(0), jnp.float32(0)
  for name, d, v, s in zip(
    names,
    *(jax.tree.leaves(t) for t in (r, observation.update, scale)),
    strict=True,
  ):
    depth = 1 - order[name] / len(order)
    absolute += depth * jnp.sum(jnp.abs(d * s))
    reference += depth * jnp.sum(jnp.abs(v * s))
  relative = absolute / (reference + 1e-30)
  return squared(simulated, observation) + ratio * relative


def cosine(simulated: Update, observation: Observation) -> Array:
  """One minus the cosine between the updates.

  Geiping et al. 2020, equation 4. An adaptive adversary moves the observed
  update to the nearest one that its payload allows.
  """
  simulated = as_sent(simulated, observation)
  w = weights(observation)
  target = observation.update
  if observation.bins is not None:
    target = jax.lax.stop_gradient(
      trees.subtract(simulated, residual(simulated, observation))
    )
  across = _weighted(simulated, target, w)
  # Of an update of zeros the slope is finite: one NaN would end a search.
  for update in (simulated, target):
    square = jnp.maximum(_weighted(update, update, w), 1e-20)
    across = across * jax.lax.rsqrt(square)
  return 1.0 - across


def straight_through(simulated: Update, observation: Observation) -> Array:
  """Squared distance from what the simulated update would be decoded as.

  The simulated update is rounded on the grid that the payload shows, and the
  gradient passes through the rounding as if it were not there (Bengio et al.
  2013). Exact for integers rounded to the nearest; other intervals are taken
  for the step of such a grid. Entries that were rounded at random, that bear
  noise or lie in an interval without an end count as in `squared`, as all do
  without `bins`.
  """
  simulated = as_sent(simulated, observation)
  bins = observation.bins
  r = residual(simulated, observation._replace(clips=None))
  if bins is not None:

    def leaf(u, r, low, high, stochastic):
      width = high - low
      grid = jnp.isfinite(width) & (width > 0) & ~jnp.asarray(stochastic)
      safe = jnp.where(grid, width, 1.0)
      middle = jnp.where(grid, (low + high) / 2, 0.0)
      steps = safe * jnp.round((u - middle) / safe)
      return jnp.where(grid, u + jax.lax.stop_gradient(steps - u), r)

    r = jax.tree.map(
      leaf, simulated, r, bins.lower, bins.upper, bins.stochastic
    )
  return _relative(r, observation)


OBJECTIVES = {
  "squared": squared,
  "straight_through": straight_through,
  "squared_and_absolute": squared_and_absolute,
  "cosine": cosine,
}


def total_variation(x: Array) -> Array:
  """Mean absolute difference of neighbouring pixels, down plus across.

  Anisotropic, as in Geiping et al. 2020 (their code; Rudin et al. 1992).

  Args:
    x: [images, height, width, channels].
  """
  down = jnp.abs(x[:, 1:] - x[:, :-1])
  across = jnp.abs(x[:, :, 1:] - x[:, :, :-1])
  return jnp.mean(down) + jnp.mean(across)


def log_likelihood(
  simulated: Update, observation: Observation, smoothing: Array | float
) -> Array:
  """Log-probability of the payload given the update, up to a constant.

  With `bins`, entry by entry: the probability that the update lies in the
  interval that the payload proves, smoothed by a logistic of a small width so
  that the search sees a slope from far away; for stochastic rounding, the
  probability 1 - |u - v| / step of drawing v, continued linearly outside the
  step; where the payload bounds nothing, a Gaussian of the expected squared
  error. Without `bins`: a Gaussian for each leaf whose variance is the one that
  the residual itself has, so that coarse leaves lose weight though nothing is
  known of the codec.

  Args:
    simulated: update of the candidate images.
    observation: what was seen.
    smoothing: width of the logistic in root mean squares of the leaf; the
      search lowers it from about 1 to nearly 0.
  """
  simulated = as_sent(simulated, observation)

  def total(terms: Update) -> Array:
    if observation.focus is not None:
      terms = trees_multiply(terms, observation.focus)
    return sum(jax.tree.leaves(terms), start=jnp.float32(0))

  if observation.bins is None:
    return total(
      jax.tree.map(
        lambda u, v: _profile(u, v, smoothing), simulated, observation.update
      )
    )

  def leaf(u, v, low, high, variance, stochastic):
    scale = smoothing * jnp.sqrt(jnp.mean(jnp.square(v))) + 1e-30
    width = high - low
    bounded = jnp.isfinite(low) | jnp.isfinite(high)
    # Inner `where`s keep infinities out of the branch that is not taken, whose
    # gradient would turn to NaN otherwise.
    soft = scale + jnp.where(jnp.isfinite(width), _SOFT_EDGE * width, 0.0)
    above = jnp.where(jnp.isfinite(high), (high - u) / soft, jnp.inf)
    below = jnp.where(jnp.isfinite(low), (u - low) / soft, jnp.inf)
    above = jnp.minimum(above, 1e6)
    below = jnp.minimum(below, 1e6)
    flat = jax.nn.log_sigmoid(above) + jax.nn.log_sigmoid(below)
    # A code at the end of the grid also takes what lies beyond: no bound there.
    down = jnp.where(jnp.isfinite(low), v - low, 0.0) + scale
    up = jnp.where(jnp.isfinite(high), high - v, 0.0) + scale
    far = jnp.where(
      u < v,
      jnp.where(jnp.isfinite(low), (v - u) / down, 0.0),
      jnp.where(jnp.isfinite(high), (u - v) / up, 0.0),
    )
    soft_step = jnp.minimum(scale / jnp.maximum(down, up) + _SOFT_EDGE, 1.0)
    drawn = jnp.log(soft_step) + _log_softplus((1.0 - far) / soft_step)
    free = -0.5 * jnp.square(u - v) / (variance + scale**2 + 1e-30)
    inside = jnp.where(stochastic, drawn, flat)
    return jnp.sum(jnp.where(bounded, inside, free))

  bins = observation.bins
  return total(
    jax.tree.map(
      leaf,
      simulated,
      observation.update,
      bins.lower,
      bins.upper,
      bins.variance,
      bins.stochastic,
    )
  )


# Width of the logistic at the edge of an interval, in widths of the interval.
_SOFT_EDGE = 0.03


def _profile(u: Array, v: Array, smoothing: Array | float) -> Array:
  """Gaussian log-likelihood of a leaf at its best variance, floored."""
  floor = jnp.square(smoothing) * jnp.mean(jnp.square(v)) + 1e-30
  variance = jnp.mean(jnp.square(u - v)) + floor
  return -0.5 * u.size * jnp.log(variance / floor)


def _log_softplus(t: Array) -> Array:
  """log(log(1 + exp(t))), which tends to t far below zero."""
  low = t < -15.0
  return jnp.where(low, t, jnp.log(jax.nn.softplus(jnp.where(low, 0.0, t))))
