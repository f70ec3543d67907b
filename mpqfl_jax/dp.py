"""Differential privacy at the client: clip the update, add noise, send.

What is stated here holds against the server itself (local model). Any two
updates that a client might send differ by at most twice the clip, so that noise
of `noise_multiplier` clips is a mechanism of half that multiplier a release.
The proofs are for real numbers; noise here is float32.
"""

from typing import NamedTuple

from mpqfl_jax import accounting, errors, transforms
from mpqfl_jax.types import UpdateTransform


class Mechanism(NamedTuple):
  """Clipping and noise at a client, and what they prove.

  Attributes:
    transform: applied to the update before the codec.
    guarantee: of the client's data against the server.
    noise_stddev: of each entry's noise, which is public.
    clips: L1 and L2 norm to which it scales down, infinite where it does not.
  """

  transform: UpdateTransform
  guarantee: accounting.Guarantee
  noise_stddev: float
  clips: tuple[float, float]


def gaussian(
  protocol: accounting.Protocol,
  clip: float = 1.0,
  noise_multiplier: float | None = None,
  epsilon: float | None = None,
) -> Mechanism:
  """Clips the L2 norm, then adds N(0, (noise_multiplier * clip)^2).

  Source: Dwork and Roth 2014, theorem A.1, on a clipped update; the exact
  accounting is that of Balle and Wang 2018.

  Args:
    protocol: how often clients send.
    clip: largest L2 norm of the update.
    noise_multiplier: standard deviation of the noise in clips; 0.1 where
      neither it nor `epsilon` is given.
    epsilon: instead, what the client that sends most may spend in the run.

  Raises:
    UserError: a parameter without meaning, or both of the last two.
  """
  transforms.require_finite("clip", clip)
  releases = accounting.most_releases(protocol.ledger)
  z = multiplier(
    noise_multiplier,
    epsilon,
    lambda target: (
      accounting.REPLACE_SENSITIVITY
      * accounting.gaussian_noise_multiplier(target, releases, protocol.delta)
    ),
  )
  return Mechanism(
    transforms.chain(
      transforms.clip(clip), transforms.gaussian_noise(z * clip)
    ),
    accounting.Guarantee(
      "local",
      "client",
      lambda ledger, delta: accounting.gaussian(
        z / accounting.REPLACE_SENSITIVITY,
        accounting.most_releases(ledger),
        delta,
      ),
    ),
    z * clip,
    (float("inf"), clip),
  )


def laplace(
  protocol: accounting.Protocol,
  clip: float = 1.0,
  noise_multiplier: float | None = None,
  epsilon: float | None = None,
) -> Mechanism:
  """Clips the L1 norm, adds Laplace noise of scale noise_multiplier * clip.

  Source: Dwork and Roth 2014, theorem 3.6, on a clipped update.

  Args:
    protocol: how often clients send.
    clip: largest L1 norm of the update.
    noise_multiplier: scale of the noise in clips; 0.1 where neither it nor
      `epsilon` is given.
    epsilon: instead, what the client that sends most may spend in the run.

  Raises:
    UserError: a parameter without meaning, or both of the last two.
  """
  transforms.require_finite("clip", clip)
  releases = accounting.most_releases(protocol.ledger)

  def spent(z, releases, delta):
    half = z / accounting.REPLACE_SENSITIVITY
    return accounting.laplace(half, releases, delta)

  z = multiplier(
    noise_multiplier,
    epsilon,
    lambda target: accounting.least(
      lambda z: spent(z, releases, protocol.delta), target
    ),
  )
  # Laplace noise of scale b has variance 2 b^2.
  stddev = 2**0.5 * z * clip
  return Mechanism(
    transforms.chain(
      transforms.clip(clip, order=1), transforms.laplace_noise(stddev)
    ),
    accounting.Guarantee(
      "local",
      "client",
      lambda ledger, delta: spent(z, accounting.most_releases(ledger), delta),
    ),
    stddev,
    (clip, float("inf")),
  )


def multiplier(
  given: float | None, epsilon: float | None, calibrated, default: float = 0.1
) -> float:
  """The noise multiplier that a user gave, or asked for by an epsilon.

  Args:
    given: the multiplier, None where it was not given.
    epsilon: the target, None where it was not given.
    calibrated: epsilon -> multiplier.
    default: where nothing was given.

  Raises:
    UserError: both were given, or a number without meaning.
  """
  if given is not None and epsilon is not None:
    raise errors.UserError(
      f"noise_multiplier={given} and epsilon={epsilon} contradict each other."
      " Expected one of them; the other follows from it."
    )
  if epsilon is not None:
    transforms.require_finite("epsilon", epsilon)
    return calibrated(epsilon)
  z = default if given is None else given
  if z == 0:
    raise errors.UserError(
      "noise_multiplier=0: expected a number above 0; without noise there is no"
      " (epsilon, delta), use the defense none."
    )
  transforms.require_finite("noise_multiplier", z)
  return z
