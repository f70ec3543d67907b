"""Epsilon of what a client, or the server, released; noise for a given epsilon.

The mechanisms are dp-accounting's; what is decided here is which event a
release really is. Three things differ between the guarantees of this package
and are part of each one (`Guarantee`):

- model: `local`, where the client itself randomises and the server sees nothing
  else, or `central`, where the server is trusted with the updates;
- unit: all of a client's data, or one example of it;
- neighbours: in the local model any two inputs of the client (replacement); in
  the central model and for examples, one unit is there or is replaced by
  nothing ("zeroed out"), so that counts of clients and of examples are public.

Releases of one client add up over the rounds that it takes part in. The server
sees who sends, so that sampling clients amplifies nothing in the local model.

>>> round(gaussian(noise_multiplier=2.0, releases=1, delta=1e-5), 3)
1.993
>>> round(gaussian_noise_multiplier(epsilon=1.993, releases=1, delta=1e-5), 3)
2.0
"""

from collections.abc import Callable
import functools
from typing import NamedTuple

import dp_accounting
from dp_accounting import rdp
from dp_accounting.pld import privacy_loss_distribution
import numpy as np
from scipy import optimize

from mpqfl_jax import errors, local

# Sensitivity of a clipped vector when one client's data are replaced by any
# other: the diameter of the ball, in units of its radius.
REPLACE_SENSITIVITY = 2.0

# Orders at which Renyi divergences are converted to (epsilon, delta).
ORDERS = np.concatenate(
  [np.linspace(1.05, 2.0, 20), np.geomspace(2.1, 1024.0, 120)]
)


class Ledger(NamedTuple):
  """What has been released so far.

  Attributes:
    rounds: rounds that are over.
    participations: [num_clients] int64, updates that the server received of
      each client.
  """

  rounds: int
  participations: np.ndarray


class Protocol(NamedTuple):
  """What a guarantee depends on beside its mechanism, all of it public.

  Attributes:
    ledger: what will have been released when the run ends.
    delta: of every (epsilon, delta).
    cohort_size: clients of a round, expected where sampling is Poisson.
    sampling_rate: probability with which each client takes part in a round,
      independently of all others; None where cohorts are drawn otherwise.
    sizes: [num_clients] int64, examples of each client.
    schedule: how a client goes through its examples.
  """

  ledger: Ledger
  delta: float
  cohort_size: int
  sampling_rate: float | None
  sizes: np.ndarray
  schedule: local.Schedule


def one_update(
  delta: float = 1e-5, size: int = 1, batch_size: int = 1
) -> Protocol:
  """The protocol of one client that sends one update."""
  return Protocol(
    Ledger(1, np.ones(1, np.int64)),
    delta,
    cohort_size=1,
    sampling_rate=None,
    sizes=np.full(1, size, np.int64),
    schedule=local.Schedule(batch_size, size),
  )


class Guarantee(NamedTuple):
  """What a mechanism proves.

  Attributes:
    model: `local` or `central`; only the former says anything about a server.
    unit: `client` or `example`: what epsilon is about.
    epsilon: (ledger, delta) -> epsilon of the unit that is worst off.
  """

  model: str
  unit: str
  epsilon: Callable[[Ledger, float], float]


def most_releases(ledger: Ledger) -> int:
  """Updates of the client that sent most."""
  return int(ledger.participations.max(initial=0))


def gaussian(noise_multiplier: float, releases: int, delta: float) -> float:
  """Epsilon of Gaussian mechanisms, exactly.

  Source: Balle and Wang 2018, theorem 8, by dp-accounting; k releases are one
  of the multiplier over sqrt(k) (Dong, Roth and Su 2022, corollary 3.3).

  Args:
    noise_multiplier: standard deviation over L2 sensitivity.
    releases: how many.
    delta: the failure probability of the guarantee.

  Returns:
    Epsilon, 0 where nothing was released.
  """
  if releases == 0:
    return 0.0
  return float(
    dp_accounting.get_epsilon_gaussian(
      noise_multiplier / np.sqrt(releases), delta
    )
  )


def gaussian_noise_multiplier(
  epsilon: float, releases: int, delta: float
) -> float:
  """The least multiplier with which `gaussian` gives `epsilon`."""
  one = dp_accounting.get_sigma_gaussian(epsilon, delta)
  return float(one * np.sqrt(releases))


def laplace(noise_multiplier: float, releases: int, delta: float) -> float:
  """Epsilon of Laplace mechanisms.

  The smaller of pure composition and the Renyi bound. Of all vectors of an L1
  norm, one that moves a single entry has the largest Renyi divergence: the
  divergence of a shift is convex in the shift and 0 at 0, so that splitting it
  over entries only lowers the sum.

  Source: Dwork and Roth 2014, theorem 3.6; Mironov 2017, proposition 6 and
  theorem 21, by dp-accounting.

  Args:
    noise_multiplier: scale of the noise over L1 sensitivity.
    releases: how many.
    delta: the failure probability of the guarantee.

  Returns:
    Epsilon, 0 where nothing was released.
  """
  if releases == 0:
    return 0.0
  accountant = rdp.RdpAccountant(ORDERS)
  accountant.compose(dp_accounting.LaplaceDpEvent(noise_multiplier), releases)
  pure = releases / noise_multiplier
  return min(pure, float(accountant.get_epsilon(delta)))


def sampled_gaussian(
  noise_multiplier: float, sampling_rate: float, releases: int, delta: float
) -> float:
  """Epsilon of Gaussian mechanisms on Poisson samples.

  Holds only where each unit is drawn independently of all others and who was
  drawn stays secret.

  Source: Koskela et al. 2020 and Doroshenko et al. 2022 (privacy loss
  distributions), by dp-accounting.

  Args:
    noise_multiplier: standard deviation over the L2 norm of one unit.
    sampling_rate: probability of each unit to be drawn.
    releases: how many.
    delta: the failure probability of the guarantee.

  Returns:
    Epsilon, 0 where nothing was released.
  """
  if releases == 0:
    return 0.0
  if sampling_rate >= 1:
    return gaussian(noise_multiplier, releases, delta)
  loss = _sampled_loss(noise_multiplier, sampling_rate, delta)
  return float(loss.self_compose(releases).get_epsilon_for_delta(delta))


@functools.lru_cache(maxsize=64)
def _sampled_loss(
  noise_multiplier: float, sampling_rate: float, delta: float
) -> privacy_loss_distribution.PrivacyLossDistribution:
  accountant = rdp.RdpAccountant(
    np.arange(2, 65), dp_accounting.NeighboringRelation.REPLACE_SPECIAL
  )
  accountant.compose(
    dp_accounting.PoissonSampledDpEvent(
      sampling_rate, dp_accounting.GaussianDpEvent(noise_multiplier)
    )
  )
  # A thousandth of one release's epsilon: the grid errs upwards, by little.
  rough = min(
    float(accountant.get_epsilon(delta)), gaussian(noise_multiplier, 1, delta)
  )
  return privacy_loss_distribution.from_gaussian_mechanism(
    noise_multiplier,
    sampling_prob=sampling_rate,
    value_discretization_interval=max(1e-3 * rough, 1e-6),
    neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_SPECIAL,
  )


def sampled_gaussian_noise_multiplier(
  epsilon: float, sampling_rate: float, releases: int, delta: float
) -> float:
  """The least multiplier with which `sampled_gaussian` gives `epsilon`."""
  return least(
    lambda z: sampled_gaussian(z, sampling_rate, releases, delta), epsilon
  )


def from_divergence(
  divergence: np.ndarray, orders: np.ndarray, delta: float
) -> float:
  """The best epsilon of a curve of Renyi divergences.

  Source: Canonne, Kamath and Steinke 2020, proposition 12, by dp-accounting.

  Args:
    divergence: [orders], Renyi divergence at each order, infinite where it is
      not known.
    orders: [orders], above 1.
    delta: the failure probability of the guarantee.
  """
  known = np.isfinite(divergence)
  if not known.any():
    return float("inf")
  epsilon, _ = rdp.compute_epsilon(orders[known], divergence[known], delta)
  return float(epsilon)


def least(
  epsilon_of: Callable[[float], float], epsilon: float, largest: float = 1e6
) -> float:
  """The least noise that keeps to an epsilon.

  Args:
    epsilon_of: noise -> epsilon, falling.
    epsilon: the target.
    largest: noise that is not exceeded.

  Returns:
    The noise, at most a ten-thousandth above the least.

  Raises:
    UserError: no noise up to `largest` is enough.
  """

  @functools.cache
  def gap(log_noise):
    value = epsilon_of(float(np.exp(log_noise)))
    return np.log(max(value, 1e-300)) - np.log(epsilon)

  # Bracketed from the noisy side: little noise is slow to account for.
  high = 1.0
  while gap(high) > 0:
    high += 1.0
    if high > np.log(largest):
      raise errors.UserError(
        f"epsilon={epsilon:g} cannot be reached in this run. Expected a larger"
        " epsilon, or fewer rounds."
      )
  low = high - 1.0
  while gap(low) < 0:
    high, low = low, low - 1.0
    if low < -20:
      return float(np.exp(high))
  root = optimize.brentq(gap, low, high, xtol=3e-5)
  # On the safe side of the root.
  while gap(root) > 0:
    root += 3e-5
  return float(np.exp(root))
