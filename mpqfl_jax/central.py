"""Central differential privacy: a trusted server clips, sums and adds noise.

The server sees every update as it is: against the server this defends nothing.
What is private is each model that it publishes, with all that came before it.

The sum of the clipped updates is divided by the expected size of the cohort,
not by how many came, and every client counts once whatever it holds: one client
moves the sum by at most the clip. Where each client takes part in a round by a
coin of its own (Poisson sampling), and who did stays secret, sampling
amplifies; otherwise it is not counted.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mpqfl_jax import accounting, dp, numerics, transforms, trees
from mpqfl_jax.errors import UserError
from mpqfl_jax.types import Array, Key, Update


class Central(NamedTuple):
  """What the server does to the updates of a round.

  Attributes:
    clip: largest L2 norm of an update, or the first one.
    noise_multiplier: deviation of the noise on the sum, in clips.
    cohort_size: what the sum is divided by.
    count_stddev: deviation of the noise on the number of updates within the
      clip; None where the clip is fixed.
    quantile: of the norms, which the clip is led to.
    rate: of the clip's steps.
    guarantee: what it proves.
  """

  clip: float
  noise_multiplier: float
  cohort_size: int
  count_stddev: float | None
  quantile: float
  rate: float
  guarantee: accounting.Guarantee

  def contribution(self, update: Update, clip: Array) -> tuple[Update, Array]:
    """One client's part of the sums: its clipped update, whether it fitted."""
    clipped, fits = transforms.clip_to(update, clip)
    return clipped, fits.astype(jnp.float32)

  def release(
    self, sums: tuple[Update, Array], clip: Array, key: Key
  ) -> tuple[Update, Array]:
    """What the server makes of the sums over a round.

    Source: McMahan et al. 2018, algorithm 1; the clip: Andrew et al. 2021,
    algorithm 1, the geometric update.

    Args:
      sums: of the clients' contributions; a client that is not there adds zero.
      clip: [] float32, of this round.
      key: of the noise.

    Returns:
      The noised mean update, the next round's clip.
    """
    total, fitted = sums
    update_key, count_key = jax.random.split(key)
    noise = transforms.gaussian_noise(1.0)
    zeros = jax.tree.map(jnp.zeros_like, total)
    drawn, _ = noise.apply(update_key, zeros, noise.init(zeros))
    total = jax.tree.map(
      lambda t, n: t + self.noise_multiplier * clip * n, total, drawn
    )
    mean = trees.scale(1 / self.cohort_size, total)
    if self.count_stddev is None:
      return mean, clip
    count = fitted + self.count_stddev * jax.random.normal(count_key)
    share = count / self.cohort_size
    return mean, clip * jnp.exp(-self.rate * (share - self.quantile))


def central(
  protocol: accounting.Protocol,
  clip: float = 1.0,
  noise_multiplier: float | None = None,
  epsilon: float | None = None,
  adaptive: bool = False,
  quantile: float = 0.5,
  rate: float = 0.2,
  count_stddev: float | None = None,
) -> Central:
  """Noise on the sum of clipped updates, with a fixed or an adaptive clip.

  With an adaptive clip, sum and count are one Gaussian mechanism: the count's
  noise is half as large in units of its sensitivity, 1/2 about 1/2, so that the
  noise on the sum has to be larger for the same multiplier (Andrew et al. 2021,
  theorem 1).

  Args:
    protocol: who takes part how often, and how it was drawn.
    clip: largest L2 norm of an update, the first one where it is adaptive.
    noise_multiplier: deviation of the noise in clips; 1.0 where neither it nor
      `epsilon` is given.
    epsilon: instead, what the run may spend.
    adaptive: whether the clip follows a quantile of the norms.
    quantile: which one; the paper's default is the median.
    rate: of the clip's steps; the paper's is 0.2.
    count_stddev: deviation of the noise on the count; a twentieth of the cohort
      where None, as in the paper.

  Raises:
    UserError: a parameter without meaning.
  """
  transforms.require_finite("clip", clip)
  transforms.require_finite("rate", rate)
  numerics.require_share("quantile", quantile)
  if not isinstance(adaptive, bool):
    raise UserError(f"adaptive={adaptive!r}: expected True or False.")
  sampling = protocol.sampling_rate
  last = protocol.ledger

  def spent(z, ledger, delta):
    if sampling is None:
      return accounting.gaussian(z, accounting.most_releases(ledger), delta)
    return accounting.sampled_gaussian(z, sampling, ledger.rounds, delta)

  def calibrated(target):
    if sampling is None:
      return accounting.gaussian_noise_multiplier(
        target, accounting.most_releases(last), protocol.delta
      )
    return accounting.sampled_gaussian_noise_multiplier(
      target, sampling, last.rounds, protocol.delta
    )

  z = dp.multiplier(noise_multiplier, epsilon, calibrated, default=1.0)
  on_sum = z
  if adaptive:
    if count_stddev is None:
      count_stddev = protocol.cohort_size / 20
    transforms.require_finite("count_stddev", count_stddev)
    if 2 * count_stddev <= z:
      raise UserError(
        f"count_stddev={count_stddev:g} is too little noise on the count for a"
        f" noise_multiplier of {z:g}. Expected more than half of that, or a"
        " larger cohort."
      )
    on_sum = (z**-2 - (2 * count_stddev) ** -2) ** -0.5
  elif count_stddev is not None:
    raise UserError(
      f"count_stddev={count_stddev:g} without adaptive=True. Expected both, or"
      " neither."
    )
  return Central(
    float(clip),
    on_sum,
    protocol.cohort_size,
    count_stddev,
    quantile,
    rate,
    accounting.Guarantee(
      "central", "client", lambda ledger, delta: spent(z, ledger, delta)
    ),
  )
