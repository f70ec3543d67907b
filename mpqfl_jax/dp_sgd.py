"""Example-level differential privacy: DP-SGD on the client.

Every example's gradient is clipped, the sum gets noise, and the client takes
its steps with that. What is protected is each example of a client, against the
server, which sees the result only. Neighbours are data sets in which one
example is replaced by nothing; how many examples a client has is public.

How batches are drawn decides the accounting:

- `fixed`: each epoch cuts a permutation into batches, so that an example is in
  one step of an epoch. One Gaussian release an epoch, nothing amplified.
- `poisson`: each example enters each step by a coin of its own, which the
  server does not see. A Poisson-sampled Gaussian release a step.
"""

from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from mpqfl_jax import (
  accounting,
  dp,
  local,
  models,
  numerics,
  transforms,
  trees,
)
from mpqfl_jax.types import Model

BATCHES = ("fixed", "poisson")


class Settings(NamedTuple):
  """DP-SGD as a defence asks for it.

  Attributes:
    clip: largest L2 norm of an example's gradient.
    noise_multiplier: deviation of the noise on a batch's sum, in clips.
    batches: one of `BATCHES`.
    microbatch: examples whose gradients are held at once.
    guarantee: what it proves.
  """

  clip: float
  noise_multiplier: float
  batches: str
  microbatch: int
  guarantee: accounting.Guarantee


def settings(
  protocol: accounting.Protocol,
  clip: float = 1.0,
  noise_multiplier: float | None = None,
  epsilon: float | None = None,
  batches: str = "fixed",
  microbatch: int = 8,
) -> Settings:
  """DP-SGD for a protocol.

  Args:
    protocol: how often clients send, and how they go through their examples.
    clip: largest L2 norm of an example's gradient.
    noise_multiplier: deviation of the noise in clips; 1.0 where neither it nor
      `epsilon` is given.
    epsilon: instead, what the worst-off example may spend in the run.
    batches: `fixed` or `poisson`.
    microbatch: examples whose gradients are held at once.

  Raises:
    UserError: a parameter without meaning.
  """
  transforms.require_finite("clip", clip)
  numerics.require_choice("batches", batches, BATCHES)
  numerics.require_range("microbatch", microbatch, 1, 2**20)

  def spent(z, ledger, delta):
    if batches == "fixed":
      return accounting.gaussian(z, _appearances(protocol, ledger), delta)
    return max(
      (
        accounting.sampled_gaussian(z, rate, steps, delta)
        for rate, steps in _sampled_steps(protocol, ledger)
      ),
      default=0.0,
    )

  def calibrated(target):
    if batches == "fixed":
      return accounting.gaussian_noise_multiplier(
        target, _appearances(protocol, protocol.ledger), protocol.delta
      )
    return accounting.least(
      lambda z: spent(z, protocol.ledger, protocol.delta), target
    )

  z = dp.multiplier(noise_multiplier, epsilon, calibrated, default=1.0)
  return Settings(
    float(clip),
    z,
    batches,
    microbatch,
    accounting.Guarantee(
      "local", "example", lambda ledger, delta: spent(z, ledger, delta)
    ),
  )


def _steps(protocol: accounting.Protocol) -> tuple[np.ndarray, np.ndarray]:
  """Steps of each client's turn, and steps of an epoch, [num_clients]."""
  schedule, sizes = protocol.schedule, protocol.sizes
  epoch = -(-sizes // schedule.batch_size)
  if schedule.steps is not None:
    return np.where(sizes > 0, schedule.steps, 0), epoch
  return schedule.epochs * epoch, epoch


def _appearances(
  protocol: accounting.Protocol, ledger: accounting.Ledger
) -> int:
  """Steps that the example that is used most was in, at most."""
  steps, epoch = _steps(protocol)
  epochs = -(-steps // np.maximum(epoch, 1))
  return int((ledger.participations * epochs).max(initial=0))


def _sampled_steps(
  protocol: accounting.Protocol, ledger: accounting.Ledger
) -> list[tuple[float, int]]:
  """(rate of the coins, steps) of clients of which none is surely better off.

  Of those of one rate, the one with most steps; a client whose rate and steps
  are both no larger than another's is no worse off than that one.
  """
  steps, _ = _steps(protocol)
  rates = np.minimum(
    1.0, protocol.schedule.batch_size / np.maximum(protocol.sizes, 1)
  )
  taken = ledger.participations * steps
  found: list[tuple[float, int]] = []
  for rate in np.unique(rates)[::-1]:
    most = int(taken[rates == rate].max())
    if most > max((n for _, n in found), default=0):
      found.append((float(rate), most))
  return found


def private_gradient(model: Model, private: Settings) -> local.BatchGradient:
  """The mean over a batch of clipped gradients, with noise.

  Source: Abadi et al. 2016, algorithm 1.

  Args:
    model: the classifier.
    private: clip, noise and how many examples' gradients are held at once.

  Returns:
    A `local.BatchGradient`; masked entries of the batch stand behind all
    others.
  """
  noise = transforms.gaussian_noise(private.clip * private.noise_multiplier)

  def of_example(params, image, label, mask):
    def loss(params):
      return models.cross_entropy(model, params, image[None], label[None])[0]

    value, grad = jax.value_and_grad(loss)(params)
    grad, _ = transforms.clip_to(grad, private.clip)
    return mask * value, trees.scale(mask, grad)

  def gradient(params, examples, rows, mask, count, key):
    micro = min(private.microbatch, len(rows))
    padding = -len(rows) % micro
    rows = jnp.pad(rows, (0, padding)).reshape(-1, micro)
    present = jnp.sum(mask)
    mask = jnp.pad(mask, (0, padding)).reshape(-1, micro)

    def chunk(i, sums):
      loss, total = jax.vmap(of_example, (None, 0, 0, 0))(
        params,
        local.images(examples, rows[i]),
        examples.y[rows[i]],
        mask[i],
      )
      summed = jax.tree.map(lambda leaf: jnp.sum(leaf, 0), (loss, total))
      return trees.add(sums, summed)

    zeros = jnp.float32(0), jax.tree.map(jnp.zeros_like, params)
    chunks = -(-present.astype(jnp.int32) // micro)
    loss, total = lax.fori_loop(0, chunks, chunk, zeros)
    total, _ = noise.apply(key, total, noise.init(total))
    # The number of examples in a Poisson batch is secret: the steps that the
    # server sees divide by its expectation.
    return loss / jnp.maximum(present, 1), trees.scale(1 / count, total)

  return gradient
