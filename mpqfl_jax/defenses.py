"""What `--defense` names: a transform, a codec, and what they prove.

Codecs alone are in `precision.CODECS`; the defences here add something to the
update before it is encoded.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mpqfl_jax import (
  accounting,
  dp,
  encrypted,
  errors,
  precision,
  specs,
  transforms,
)
from mpqfl_jax.types import Bins, Codec, Params, Payload, UpdateTransform


class Defense(NamedTuple):
  """A defence, built for one model.

  Attributes:
    spec: as the user wrote it; the name in result files.
    transform: applied to the update at the client, before the codec.
    codec: how the update crosses the wire.
    guarantee: what it proves, None where there is no proof.
    noise_stddev: of the noise that the transform adds, which whoever knows the
      defence knows, too.
    encryption: of the update on its way and in the server's sum, None where the
      server reads it.
  """

  spec: str
  transform: UpdateTransform
  codec: Codec
  guarantee: accounting.Guarantee | None
  noise_stddev: float = 0.0
  encryption: encrypted.Options | None = None

  @property
  def unreadable(self) -> str | None:
    """Why the server cannot attack what it sees, None where it can."""
    if self.encryption is None or self.encryption.attacker_holds_key:
      return None
    return encrypted.UNREADABLE

  def epsilon(self, ledger: accounting.Ledger, delta: float) -> float | None:
    """Epsilon of what was released, None where there is no proof."""
    if self.guarantee is None:
      return None
    return self.guarantee.epsilon(ledger, delta)


def _additive(
  mechanism: Callable[..., dp.Mechanism],
) -> Callable[..., Defense]:
  """The defence of a mechanism that adds noise and sends float32."""

  def build(
    params: Params,
    protocol: accounting.Protocol,
    clip: float = 1.0,
    noise_multiplier: float | None = None,
    epsilon: float | None = None,
  ) -> Defense:
    built = mechanism(protocol, clip, noise_multiplier, epsilon)
    return Defense(
      "",
      built.transform,
      precision.make("none", params),
      built.guarantee,
      built.noise_stddev,
    )

  return build


def _he(
  params: Params,
  protocol: accounting.Protocol,
  keys: str = "shared",
  degree: int = 4096,
  modulus_bits: int | None = None,
  bound: float = 4.0,
  min_clients: int = 3,
  attacker_holds_key: bool | str = False,
) -> Defense:
  del protocol  # encryption has no (epsilon, delta)
  return Defense(
    "",
    transforms.identity(),
    precision.make("none", params),
    None,
    encryption=encrypted.options(
      keys, degree, modulus_bits, bound, min_clients, attacker_holds_key
    ),
  )


# name -> (constructor, one line with its source)
TRANSFORMING: dict[str, tuple[Callable[..., Defense], str]] = {
  "dp_gaussian": (
    _additive(dp.gaussian),
    "L2 clip and Gaussian noise at the client, Dwork and Roth 2014",
  ),
  "dp_laplace": (
    _additive(dp.laplace),
    "L1 clip and Laplace noise at the client, Dwork and Roth 2014",
  ),
  "he": (
    _he,
    "sums of ciphertexts: CKKS, Cheon et al. 2017",
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


def make(
  spec: str, params: Params, protocol: accounting.Protocol | None = None
) -> Defense:
  """Builds a defence for a model's updates.

  Args:
    spec: `name` or `name(key=value,...)`, a name of `TRANSFORMING` or of
      `precision.CODECS`, or a path to a policy file.
    params: the model's parameters, or their shapes.
    protocol: what a guarantee depends on beside its mechanism; one client that
      sends one update where None.

  Raises:
    UserError: no such defence, or parameters that it does not take.
  """
  name, options = specs.parse(spec)
  if name in TRANSFORMING:
    constructor = TRANSFORMING[name][0]
    built = specs.call(
      f"defense {name}",
      constructor,
      options,
      params,
      protocol or accounting.one_update(),
    )
    return built._replace(spec=spec)
  known = [*TRANSFORMING, *precision.CODECS]
  if name not in precision.CODECS and not name.endswith(".toml"):
    raise errors.unknown_name("defense", name, known)
  codec = precision.make(name, params, **options)
  return Defense(spec, transforms.identity(), codec, None)
