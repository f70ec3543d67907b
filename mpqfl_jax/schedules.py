"""Learning rates as functions of the round: what a schedule's flag names.

Examples:
  >>> rate = make("cosine(warmup=2)", learning_rate=0.3, rounds=12)
  >>> [round(float(rate(r)), 3) for r in (0, 1, 2, 7, 12)]
  [0.1, 0.2, 0.3, 0.15, 0.0]
"""

from collections.abc import Callable

import numpy as np
import optax

from mpqfl_jax import errors, numerics, specs
from mpqfl_jax.types import Array

# round, from 0 -> learning rate; traceable
Schedule = Callable[[Array | int], Array | float]


def _constant(rate: float, rounds: int) -> Schedule:
  del rounds
  return optax.schedules.constant_schedule(rate)


def _cosine(rate: float, rounds: int, final: float = 0.0) -> Schedule:
  if final != 0:
    numerics.require_share("schedule cosine: final", final)
  return optax.schedules.cosine_decay_schedule(rate, rounds, alpha=final)


def _linear(rate: float, rounds: int, final: float = 0.0) -> Schedule:
  if final != 0:
    numerics.require_positive("schedule linear: final", final)
  return optax.schedules.linear_schedule(rate, final * rate, rounds)


def _exponential(
  rate: float, rounds: int, decay: float = 0.99, every: int = 1
) -> Schedule:
  del rounds
  numerics.require_share("schedule exponential: decay", decay)
  numerics.require_positive("schedule exponential: every", every)
  return optax.schedules.exponential_decay(rate, every, decay)


def _step(
  rate: float, rounds: int, factor: float = 0.1, at: int | tuple | None = None
) -> Schedule:
  del rounds
  places = at if isinstance(at, tuple) else (at,)
  if not all(isinstance(p, int) and p >= 1 for p in places):
    raise errors.UserError(
      f"schedule step(at={at}). Expected the rounds from which the rate is"
      " lower, such as step(at=(30,60))."
    )
  numerics.require_positive("schedule step: factor", factor)
  # The schedule counts rounds from 0, flags and metrics from 1.
  return optax.schedules.piecewise_constant_schedule(
    rate, {place - 1: factor for place in places}
  )


# name -> (constructor of (rate, rounds after the warm-up, ...), what it does)
SCHEDULES: dict[str, tuple[Callable[..., Schedule], str]] = {
  "constant": (_constant, "the same in every round"),
  "cosine": (_cosine, "down to `final` times the rate, half a cosine"),
  "linear": (_linear, "down to `final` times the rate in a line"),
  "exponential": (_exponential, "times `decay` every `every` rounds, smoothly"),
  "step": (_step, "times `factor` from each round of `at`, counted from 1"),
}


def make(spec: str, learning_rate: float, rounds: int) -> Schedule:
  """Builds a schedule from `name` or `name(key=value,...)`.

  Every schedule takes `warmup`: rounds before the rate is reached. It grows in
  a line, from 1 / (warmup + 1) of the rate in the first round, because a rate
  of 0 would waste that round; the schedule's own course begins afterwards.

  Args:
    spec: names an entry of `SCHEDULES`.
    learning_rate: the highest rate.
    rounds: of the whole run, which decays that have an end reach then.

  Returns:
    round, counted from 0 -> rate.

  Raises:
    UserError: no such schedule, parameters that it does not take, or a rate
      that is not positive in some round.
  """
  name, options = specs.parse(spec)
  if name not in SCHEDULES:
    raise errors.unknown_name("schedule", name, SCHEDULES)
  warmup = options.pop("warmup", 0)
  numerics.require_range(f"schedule {name}: warmup", warmup, 0, rounds - 1)
  body = specs.call(
    f"schedule {name}",
    SCHEDULES[name][0],
    options,
    learning_rate,
    rounds - warmup,
  )
  if warmup:
    rise = optax.schedules.linear_schedule(
      learning_rate / (warmup + 1), learning_rate, warmup
    )
    body = optax.schedules.join_schedules([rise, body], [warmup])
  rates = np.asarray([body(r) for r in (0, rounds // 2, rounds - 1)])
  if not (np.isfinite(rates).all() and (rates > 0).all()):
    raise errors.UserError(
      f"schedule {spec} reaches the rate {rates.min()} within {rounds} rounds."
      " Expected one that stays above 0."
    )
  return body
