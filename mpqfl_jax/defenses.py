"""What `--defense` names: a transform, a codec, and what they prove.

Codecs alone are in `precision.CODECS`; the defences here add something to the
update before it is encoded.
"""

from collections.abc import Callable, Sequence
import functools
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpqfl_jax import (
  accounting,
  dp,
  dp_sgd,
  encrypted,
  errors,
  heuristics,
  models,
  policy,
  precision,
  private_codecs,
  specs,
  transforms,
)
from mpqfl_jax import central as central_lib
from mpqfl_jax.types import Array, Bins, Codec, Params, Payload, UpdateTransform


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
    clips: L1 and L2 norm to which the transform scales the update down.
    noise_in_codec: whether it is the codec that randomises: what else a client
      sends through it is another release.
    central: what a trusted server adds; None where it adds nothing.
    gradient: what takes the place of the gradient of a batch's mean loss; None
      where nothing does.
    sgd: the settings of `gradient` where that is DP-SGD's.
    mixup: its settings where `gradient` mixes the images of a batch.
    hides_rows: path of a kernel of which some rows are withheld, and sent as
      zero; None where there is none.
  """

  spec: str
  transform: UpdateTransform
  codec: Codec
  guarantee: accounting.Guarantee | None
  noise_stddev: float = 0.0
  clips: tuple[float, float] = (float("inf"), float("inf"))
  noise_in_codec: bool = False
  central: central_lib.Central | None = None
  gradient: heuristics.GradientRule | None = None
  sgd: dp_sgd.Settings | None = None
  mixup: heuristics.Mixup | None = None
  hides_rows: tuple[str, ...] | None = None
  encryption: encrypted.Options | None = None

  @property
  def unreadable(self) -> str | None:
    """Why the server cannot attack what it sees, None where it can."""
    if self.encryption is None or self.encryption.attacker_holds_key:
      return None
    return encrypted.UNREADABLE

  @property
  def poisson(self) -> bool:
    """Whether clients draw their batches by coins, as the proof needs it."""
    return self.sgd is not None and self.sgd.batches == "poisson"

  def epsilon(self, ledger: accounting.Ledger, delta: float) -> float | None:
    """Epsilon of what was released, None where there is no proof."""
    if self.guarantee is None:
      return None
    return self.guarantee.epsilon(ledger, delta)


def _as_it_is(params: Params) -> Defense:
  """An update sent in float32, nothing done to it: what others start from."""
  return Defense(
    "", transforms.identity(), precision.make("none", params), None
  )


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
      built.clips,
    )

  return build


def _he(
  params: Params,
  protocol: accounting.Protocol,
  keys: str = "shared",
  degree: int = 4096,
  modulus_bits: int | None = None,
  bound: float | None = None,
  bits: int | None = None,
  min_clients: int = 3,
  attacker_holds_key: bool = False,
) -> Defense:
  del protocol  # encryption has no (epsilon, delta)
  chosen = encrypted.options(
    keys, degree, modulus_bits, bound, bits, min_clients, attacker_holds_key
  )
  # Rounding is noise to whoever holds the key, as it takes place at the client.
  return _as_it_is(params)._replace(
    encryption=chosen, noise_stddev=chosen.rounding_stddev
  )


def _dp_central(
  params: Params,
  protocol: accounting.Protocol,
  clip: float = 1.0,
  noise_multiplier: float | None = None,
  epsilon: float | None = None,
  adaptive: bool = False,
  quantile: float = 0.5,
  rate: float = 0.2,
  count_stddev: float | None = None,
) -> Defense:
  built = central_lib.central(
    protocol,
    clip,
    noise_multiplier,
    epsilon,
    adaptive,
    quantile,
    rate,
    count_stddev,
  )
  return _as_it_is(params)._replace(guarantee=built.guarantee, central=built)


def _dp_sgd(
  params: Params,
  protocol: accounting.Protocol,
  clip: float = 1.0,
  noise_multiplier: float | None = None,
  epsilon: float | None = None,
  batches: str = "fixed",
  microbatch: int = 8,
) -> Defense:
  settings = dp_sgd.settings(
    protocol, clip, noise_multiplier, epsilon, batches, microbatch
  )
  return _as_it_is(params)._replace(
    guarantee=settings.guarantee,
    gradient=functools.partial(dp_sgd.private_gradient, private=settings),
    sgd=settings,
  )


def _clip(
  params: Params, protocol: accounting.Protocol, norm: float = 1.0
) -> Defense:
  del protocol  # without noise there is no (epsilon, delta)
  return _as_it_is(params)._replace(
    transform=transforms.clip(norm), clips=(float("inf"), norm)
  )


def _soteria(
  params: Params, protocol: accounting.Protocol, ratio: float = 0.5
) -> Defense:
  del protocol
  chosen = heuristics.soteria(ratio)
  return _as_it_is(params)._replace(
    gradient=functools.partial(heuristics.pruned_gradient, chosen=chosen),
    hides_rows=models.head(params).kernel,
  )


def _mixup(
  params: Params, protocol: accounting.Protocol, alpha: float = 1.0
) -> Defense:
  del protocol
  mixing = heuristics.mixup(alpha)
  return _as_it_is(params)._replace(
    gradient=functools.partial(heuristics.mixed_gradient, mixing=mixing),
    mixup=mixing,
  )


def _dp_pbm(
  params: Params,
  protocol: accounting.Protocol,
  clip: float = 1.0,
  bound: float | None = None,
  theta: float | None = None,
  trials: int = 16,
  epsilon: float | None = None,
) -> Defense:
  return _quantised(
    params,
    protocol,
    clip,
    bound,
    # From 1/2, where nothing is hidden, to 0.
    lambda noise: private_codecs.poisson_binomial(0.5 / (1 + noise), trials),
    None if theta is None else private_codecs.poisson_binomial(theta, trials),
    private_codecs.poisson_binomial(0.25, trials),
    epsilon,
    f"theta={theta}",
  )


def _dp_rqm(
  params: Params,
  protocol: accounting.Protocol,
  clip: float = 1.0,
  bound: float | None = None,
  margin: float | None = None,
  levels: int = 16,
  keep: float = 0.42,
  epsilon: float | None = None,
) -> Defense:
  def build(margin):
    return private_codecs.randomised_quantisation(margin, levels, keep)

  return _quantised(
    params,
    protocol,
    clip,
    bound,
    build,
    None if margin is None else build(margin),
    build(1.0),
    epsilon,
    f"margin={margin}",
  )


def _quantised(
  params: Params,
  protocol: accounting.Protocol,
  clip: float,
  bound: float | None,
  noisy: Callable[[float], private_codecs.Mechanism],
  given: private_codecs.Mechanism | None,
  default: private_codecs.Mechanism,
  epsilon: float | None,
  words: str,
) -> Defense:
  """The defence of a private quantiser on updates of a clipped L2 norm.

  Args:
    params: the model's parameters, or their shapes.
    protocol: how often clients send.
    clip: largest L2 norm of the update.
    bound: entries are clamped to this; the clip where None.
    noisy: noise -> the quantiser, for a given epsilon.
    given: the quantiser that was asked for, None where it was not.
    default: where neither it nor an epsilon was given.
    epsilon: what the client that sends most may spend in the run.
    words: the parameter that decides the noise, as the user gave it.
  """
  transforms.require_finite("clip", clip)
  bound = clip if bound is None else bound
  private_codecs.check_bound(bound, clip)
  if given is not None and epsilon is not None:
    raise errors.UserError(
      f"{words} and epsilon={epsilon} contradict each other. Expected one of"
      " them; the other follows from it."
    )
  leaves = len(jax.tree.leaves(params))

  def parts(mechanism):
    return [private_codecs.Part(mechanism, bound)] * leaves

  if epsilon is None:
    return _private(params, clip, parts(default if given is None else given))
  return _calibrated(
    params, protocol, clip, lambda noise: parts(noisy(noise)), epsilon
  )


def _private(
  params: Params, clip: float, parts: Sequence[private_codecs.Part | None]
) -> Defense:
  return Defense(
    "",
    transforms.clip(clip),
    private_codecs.codec(params, parts),
    private_codecs.guarantee(params, parts, clip),
    clips=(float("inf"), clip),
    noise_in_codec=True,
  )


def _calibrated(
  params: Params,
  protocol: accounting.Protocol,
  clip: float,
  noisy: Callable[[float], Sequence[private_codecs.Part | None]],
  epsilon: float,
) -> Defense:
  """With as little noise as an epsilon allows."""
  transforms.require_finite("epsilon", epsilon)

  def spent(noise):
    proof = private_codecs.guarantee(params, noisy(noise), clip)
    return proof.epsilon(protocol.ledger, protocol.delta)

  return _private(params, clip, noisy(accounting.least(spent, epsilon)))


def _dp_policy(
  params: Params,
  protocol: accounting.Protocol,
  file: str,
  clip: float = 1.0,
  epsilon: float | None = None,
) -> Defense:
  """Layers with different private quantisers, one proof for all of them.

  Args:
    params: the model's parameters, or their shapes.
    protocol: how often clients send.
    file: a policy whose rules name `pbm` (options `theta`, `trials`), `rqm`
      (`margin`, `levels`, `keep`), each with a `bound`, the clip where it has
      none; or `withheld`.
    clip: largest L2 norm of the update.
    epsilon: what the client that sends most may spend in the run. The thetas
      are divided, and the margins multiplied, by what it takes.
  """
  transforms.require_finite("clip", clip)
  name, rules = policy.read(pathlib.Path(file))
  assigned = policy.assign(name, rules, params)

  def parts(noise):
    return [private_codecs.part(name, rule, clip, noise) for rule in assigned]

  if epsilon is None:
    return _private(params, clip, parts(0.0))
  return _calibrated(params, protocol, clip, parts, epsilon)


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
    "sums of ciphertexts: CKKS, or BFV of whole numbers of a few bits",
  ),
  "dp_pbm": (_dp_pbm, "Poisson-binomial mechanism, Chen et al. 2022"),
  "dp_policy": (
    _dp_policy,
    "layers with private quantisers of their own, by a policy file",
  ),
  "dp_central": (
    _dp_central,
    "clip and Gaussian noise at a trusted server, McMahan et al. 2018",
  ),
  "dp_sgd": (
    _dp_sgd,
    "clip and noise on each example's gradient, Abadi et al. 2016",
  ),
  "dp_rqm": (_dp_rqm, "randomised quantisation mechanism, Youn et al. 2023"),
  "clip": (_clip, "scales the update down to an L2 norm, and adds nothing"),
  "soteria": (
    _soteria,
    "withholds the last layer's most telling features, Sun et al. 2021",
  ),
  "mixup": (
    _mixup,
    "mixes the images of a batch, Zhang et al. 2018, Huang et al. 2021",
  ),
}


def bins(
  defense: Defense,
  payload: Payload,
  learning_rate: float = 1.0,
  steps: int = 1,
  batch: int = 1,
) -> Bins:
  """What a payload says of the update before the noise, for an attacker.

  Noise moves every entry without a bound and adds its variance. That of DP-SGD
  adds up over the steps, as if none of it changed the gradients that follow.

  Args:
    defense: what the client did.
    payload: what it sent.
    learning_rate: of its steps.
    steps: of all its epochs together.
    batch: examples in each.
  """
  known = defense.codec.bins(payload)
  if defense.hides_rows is not None:
    sent = defense.codec.decode(payload)
    known = heuristics.unseen_rows(known, sent, defense.hides_rows)
  noise = defense.noise_stddev**2
  if defense.sgd is not None:
    stddev = defense.sgd.clip * defense.sgd.noise_multiplier
    noise += steps * (learning_rate * stddev / batch) ** 2
  if not noise:
    return known
  return Bins(
    lower=jax.tree.map(lambda u: jnp.full_like(u, -jnp.inf), known.lower),
    upper=jax.tree.map(lambda u: jnp.full_like(u, jnp.inf), known.upper),
    variance=jax.tree.map(lambda v: v + noise, known.variance),
    stochastic=jax.tree.map(lambda flag: False, known.stochastic),
  )


def clips(defense: Defense, learning_rate: float, single: bool) -> Array:
  """L1 and L2 norm to which an update was scaled down, [2] float32.

  Clipping of each example's gradient is clipping of the update where one
  example makes one step; of a sum over examples, it is not modelled. Nor is
  what a private quantiser clamps at its bound.

  Args:
    defense: what the client did.
    learning_rate: of its steps.
    single: whether one example made one step.
  """
  found = np.array(defense.clips, np.float32)
  if defense.sgd is not None and single:
    found[1] = learning_rate * defense.sgd.clip
  return jnp.asarray(found)


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
    if pathlib.PurePath(name).suffix or len(pathlib.PurePath(name).parts) > 1:
      raise errors.UserError(
        f"unknown defense {name!r}: policy files end in .toml. Expected one, or"
        " a name that list codecs defences shows."
      )
    raise errors.unknown_name("defense", name, known)
  codec = precision.make(name, params, **options)
  return Defense(spec, transforms.identity(), codec, None)
