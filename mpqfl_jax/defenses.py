"""What `--defense` names: a transform, a codec, and what they prove.

Codecs alone are in `precision.CODECS`; the defences here add something to the
update before it is encoded.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mpqfl_jax import dp, errors, precision, specs, transforms
from mpqfl_jax.types import Bins, Codec, Params, Payload, UpdateTransform


class Defense(NamedTuple):
  """A defence, built for one model.

  Attributes:
    spec: as the user wrote it; the name in result files.
    transform: applied to the update at the client, before the codec.
    codec: how the update crosses the wire.
    epsilon: (number of updates that one client sent, delta) -> epsilon of its
      local differential privacy, None where there is no proof.
    noise_stddev: of the noise that the transform adds, which whoever knows the
      defence knows, too.
  """

  spec: str
  transform: UpdateTransform
  codec: Codec
  epsilon: Callable[[int, float], float] | None
  noise_stddev: float = 0.0


def _dp_gaussian(
  params: Params, clip: float = 1.0, noise_multiplier: float = 0.1
) -> Defense:
  return Defense(
    "",
    dp.gaussian(clip, noise_multiplier),
    precision.make("none", params),
    lambda releases, delta: dp.gaussian_epsilon(
      noise_multiplier, releases, delta
    ),
    noise_stddev=noise_multiplier * clip,
  )


# name -> (constructor, one line with its source)
TRANSFORMING: dict[str, tuple[Callable[..., Defense], str]] = {
  "dp_gaussian": (
    _dp_gaussian,
    "clip and Gaussian noise at the client, Dwork and Roth 2014",
  ),
}


def bins(defense: Defense, payload: Payload) -> Bins:
  """What a payload says of the update before the noise, for an attacker.

  Noise moves every entry without a bound and adds its variance. That the update
  may have been clipped is not said.
  """
  known = defense.codec.bins(payload)
  if not defense.noise_stddev:
    return known
  return Bins(
    lower=jax.tree.map(lambda u: jnp.full_like(u, -jnp.inf), known.lower),
    upper=jax.tree.map(lambda u: jnp.full_like(u, jnp.inf), known.upper),
    variance=jax.tree.map(
      lambda v: v + defense.noise_stddev**2, known.variance
    ),
    stochastic=jax.tree.map(lambda flag: False, known.stochastic),
  )


def make(spec: str, params: Params) -> Defense:
  """Builds a defence for a model's updates.

  Args:
    spec: `name` or `name(key=value,...)`, a name of `TRANSFORMING` or of
      `precision.CODECS`, or a path to a policy file.
    params: the model's parameters, or their shapes.

  Raises:
    UserError: no such defence, or parameters that it does not take.
  """
  name, options = specs.parse(spec)
  if name in TRANSFORMING:
    constructor = TRANSFORMING[name][0]
    built = specs.call(f"defense {name}", constructor, options, params)
    return built._replace(spec=spec)
  known = [*TRANSFORMING, *precision.CODECS]
  if name not in precision.CODECS and not name.endswith(".toml"):
    raise errors.unknown_name("defense", name, known)
  codec = precision.make(name, params, **options)
  return Defense(spec, transforms.identity(), codec, None)
