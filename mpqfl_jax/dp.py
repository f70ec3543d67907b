"""Differential privacy: what a mechanism's noise proves, as (epsilon, delta).

The accounting is dp-accounting's. What is stated here holds against the server
itself: the client clips its update to an L2 norm of `clip` and adds noise
before sending (local model). Any two updates that a client might send differ by
at most 2 * clip, so a standard deviation of `noise_multiplier * clip` is a
Gaussian mechanism with a multiplier of `noise_multiplier / 2` per release.
Releases of one client add up over the rounds it takes part in; no amplification
by sampling is claimed, because the server sees who sends.
"""

import dp_accounting
from dp_accounting import rdp

from mpqfl_jax import errors, transforms
from mpqfl_jax.types import UpdateTransform

# Sensitivity of a clipped vector when one client's data are replaced by any
# other: the diameter of the ball, in units of its radius.
REPLACE_SENSITIVITY = 2.0


def gaussian(clip: float, noise_multiplier: float) -> UpdateTransform:
  """Clips the update, then adds N(0, (noise_multiplier * clip)^2) noise.

  Source: Dwork and Roth 2014, theorem A.1, on a clipped update.

  Args:
    clip: largest L2 norm of the update.
    noise_multiplier: standard deviation of the noise in units of `clip`.

  Raises:
    UserError: either is not positive.
  """
  if not noise_multiplier > 0:
    raise errors.UserError(
      f"noise_multiplier is {noise_multiplier}. Expected a number above 0; "
      "without noise there is no (epsilon, delta), use the defense none."
    )
  return transforms.chain(
    transforms.clip(clip), transforms.gaussian_noise(noise_multiplier * clip)
  )


def gaussian_epsilon(
  noise_multiplier: float, releases: int, delta: float
) -> float:
  """Epsilon of `releases` clipped and noised updates of one client.

  Source: Mironov 2017, proposition 7 and theorem 20, by dp-accounting; each
  release is a Gaussian mechanism of the multiplier `noise_multiplier / 2` (see
  the module's docstring).

  Args:
    noise_multiplier: as for `gaussian`.
    releases: how often the client sent an update.
    delta: the failure probability of the guarantee.

  Returns:
    Epsilon, 0 where nothing was released.
  """
  if releases == 0:
    return 0.0
  accountant = rdp.RdpAccountant()
  accountant.compose(
    dp_accounting.GaussianDpEvent(noise_multiplier / REPLACE_SENSITIVITY),
    releases,
  )
  return float(accountant.get_epsilon(delta))
