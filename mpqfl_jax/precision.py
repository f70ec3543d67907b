"""Which codec each layer gets: leaf codecs and whole policies by name.

>>> import jax.numpy as jnp
>>> params = {"conv1": {"kernel": jnp.ones((3, 3, 1, 8)), "bias": jnp.ones(8)}}
>>> codec = make("int4", params, mode="affine", granularity="channel")
>>> payload, _ = codec.encode(jax.random.key(0), params, codec.init(params))
>>> int(codec.num_bytes(payload)) == len(codec.pack(payload))
True
"""

from collections.abc import Callable, Mapping, Sequence
import glob
import inspect
import math
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mpqfl_jax import (
  budget,
  choice,
  codecs,
  columns,
  entropy,
  errors,
  native,
  numerics,
  policy,
  rotation,
  sparsify,
  trees,
  wire,
)
from mpqfl_jax.errors import UserError
from mpqfl_jax.policy import QuantRule
from mpqfl_jax.types import Array, Codec, Key, Params, PyTree, Update

Granularity = str | int
# Who compiles the passes of a codec that has a choice.
KERNELS = ("xla", "native")


def _integer(bits: int) -> Callable[..., codecs.LeafCodec]:
  def build(
    shape: codecs.Shape,
    mode: str = "affine" if bits == 1 else "symmetric",
    granularity: Granularity = "tensor",
    rounding: str = "nearest",
    power_of_two: bool = False,
    rotate: bool = False,
    range: str = "dynamic",
    momentum: float = 0.9,
    kernels: str = "xla",
  ) -> codecs.LeafCodec:
    numeric = numerics.integer(bits, mode, rounding, power_of_two)
    blocks = _blocks(granularity)
    numerics.require_choice("range", range, ("dynamic", "static"))
    if range == "static":
      numerics.require_share("momentum", momentum)
    past = momentum if range == "static" else None
    if not rotate:
      return _blockwise(shape, numeric, blocks, kernels, past)
    if kernels != "xla":
      raise UserError(f"kernels={kernels}: expected rotate=False.")
    return rotation.rotated(
      shape, lambda flat, _: codecs.blockwise(flat, numeric, blocks, past)
    )

  return build


def _half(name: str) -> Callable[..., codecs.LeafCodec]:
  def build(
    shape: codecs.Shape, rounding: str = "nearest", kernels: str = "xla"
  ) -> codecs.LeafCodec:
    numeric = numerics.cast(name, rounding)
    return _blockwise(shape, numeric, "tensor", kernels)

  return build


def _float8(
  shape: codecs.Shape,
  format: str = "e4m3",
  granularity: Granularity = "tensor",
  rounding: str = "nearest",
  kernels: str = "xla",
) -> codecs.LeafCodec:
  numerics.require_choice("format", format, ("e4m3", "e5m2"))
  numeric = numerics.cast(f"float8_{format}", rounding)
  return _blockwise(shape, numeric, granularity, kernels)


def _sign(
  shape: codecs.Shape, granularity: Granularity = "tensor"
) -> codecs.LeafCodec:
  return _blockwise(shape, numerics.sign(), granularity)


def _ternary(
  shape: codecs.Shape, clip: float = 2.5, granularity: Granularity = "tensor"
) -> codecs.LeafCodec:
  return _blockwise(shape, numerics.ternary(clip), granularity)


def _qsgd(
  shape: codecs.Shape,
  levels: int = 7,
  norm: str = "l2",
  granularity: Granularity = "tensor",
) -> codecs.LeafCodec:
  return _blockwise(shape, numerics.qsgd(levels, norm), granularity)


def _nf4(
  shape: codecs.Shape, granularity: Granularity = 64
) -> codecs.LeafCodec:
  return _blockwise(shape, numerics.nf4(), granularity)


def _drive(shape: codecs.Shape, unbiased: bool = True) -> codecs.LeafCodec:
  numeric = numerics.sign(unbiased)
  return rotation.rotated(
    shape, lambda flat, block: codecs.blockwise(flat, numeric, block)
  )


def _prune(shape: codecs.Shape, ratio: float = 0.9) -> codecs.LeafCodec:
  numerics.require_share("ratio", ratio)
  return sparsify.largest(
    shape, lambda n: n - int(ratio * n), f"prune ratio={ratio:g}"
  )


def _topk(shape: codecs.Shape, ratio: float = 0.01) -> codecs.LeafCodec:
  numerics.require_share("ratio", ratio)
  return sparsify.largest(
    shape, lambda n: max(1, round(ratio * n)), f"topk ratio={ratio:g}"
  )


def _randomk(shape: codecs.Shape, ratio: float = 0.01) -> codecs.LeafCodec:
  numerics.require_share("ratio", ratio)
  if ratio < 2**-24:
    raise UserError(f"ratio={ratio}: expected at least 2^-24, its resolution.")
  return sparsify.random(shape, ratio)


# What a rule may name: name -> (what it is, constructor of a leaf's codec).
LEAF_CODECS: dict[str, tuple[str, Callable[..., codecs.LeafCodec]]] = {
  "float32": ("the update as it is", codecs.float32),
  "float16": ("half precision, IEEE 754-2019", _half("float16")),
  "bfloat16": (
    "the upper half of a float32, Kalamkar et al. 2019",
    _half("bfloat16"),
  ),
  "float8": ("e4m3 or e5m2 with a scale, Micikevicius et al. 2022", _float8),
  **{
    f"int{bits}": (
      f"integers of {bits} bit{'s'[: bits - 1]}, Jacob et al. 2018",
      _integer(bits),
    )
    for bits in (*range(1, 9), 16)
  },
  "sign": ("signs and the mean magnitude, Bernstein et al. 2018", _sign),
  "ternary": ("TernGrad: -s, 0, s at random, Wen et al. 2017", _ternary),
  "qsgd": (
    "multiples of the norm over s, at random, Alistarh et al. 2017",
    _qsgd,
  ),
  "nf4": ("quantiles of a normal distribution, Dettmers et al. 2023", _nf4),
  "drive": ("signs of the rotated update, Vargaftik et al. 2021", _drive),
  "prune": ("zeroes the smallest magnitudes, Zhu et al. 2019", _prune),
  "topk": ("sends only the largest magnitudes, Aji and Heafield 2017", _topk),
  "randomk": ("sends random entries, unbiased, Konečný et al. 2016", _randomk),
  "withheld": ("not sent: for the layers of a policy file", choice.withheld),
}

# The turns that layers take in `paper`, from the first layer on. A
# reconstruction: Ovi et al. (arXiv 2210.13457) quantise different layers with
# different precision and different modes, but which layer gets which is not in
# the published text.
PAPER_TURNS: tuple[tuple[str, dict[str, str]], ...] = (
  ("float16", {}),
  ("int8", {"mode": "affine"}),
  ("int8", {"mode": "symmetric"}),
  ("int4", {"mode": "affine"}),
)

# What `mixed_random` draws from: the same precisions and modes.
MIXED_OPTIONS = (
  choice.Option("float16"),
  choice.Option("int8", "affine"),
  choice.Option("int8", "symmetric"),
  choice.Option("int4", "affine"),
)


def leaf_codec(
  precision: str, shape: codecs.Shape, options: Mapping[str, Any]
) -> codecs.LeafCodec:
  """Builds a leaf's codec by name; raises UserError on a bad name or option."""
  if precision not in LEAF_CODECS:
    raise errors.unknown_name("precision", precision, LEAF_CODECS)
  build = LEAF_CODECS[precision][1]
  _check_options(precision, build, options)
  return build(shape, **options)


def from_rules(
  name: str,
  rules: Sequence[QuantRule],
  params: Params,
  file: str | None = None,
) -> Codec:
  """The codec that sends every leaf by the first rule that matches it.

  Args:
    name: of the policy; both sides of the wire compare it.
    rules: in order of precedence.
    params: parameters, or their shapes.
    file: where the rules come from, for messages.

  Returns:
    The codec.

  Raises:
    UserError: a leaf that no rule matches, a rule that is first for no leaf, an
      unknown precision or option.
  """
  leaves = []
  for rule, leaf in zip(
    policy.assign(name, rules, params), jax.tree.leaves(params), strict=True
  ):
    try:
      leaves.append(leaf_codec(rule.precision, tuple(leaf.shape), rule.options))
    except UserError as e:
      if file is None:
        raise
      raise UserError(
        f"policy file {file}, rule {rules.index(rule) + 1}: {e}"
      ) from e
  return codecs.per_leaf(name, params, leaves)


def paper(params: Params) -> Codec:
  """Layers take turns between precisions and modes, see `PAPER_TURNS`."""
  rules = []
  for i, layer in enumerate(policy.layers(params)):
    precision, options = PAPER_TURNS[i % len(PAPER_TURNS)]
    rules.append(QuantRule(glob.escape(layer), precision, options))
  return from_rules("paper", rules, params)


def mixed_random(
  params: Params, rounding: str = "nearest", bits: Sequence[int] = ()
) -> Codec:
  """Every leaf's precision and mode drawn anew for each round and client.

  The server always knows the draw: it is on the wire, as it must be for whoever
  decodes a single update. A blind attacker ignores it, an adaptive one does
  not.

  Args:
    params: parameters, or their shapes.
    rounding: `nearest` or `stochastic`.
    bits: integers of these widths in both modes are drawn from, all equally
      often; `MIXED_OPTIONS` where empty.

  Returns:
    The codec.
  """
  if not isinstance(bits, Sequence) or isinstance(bits, str):
    raise UserError(
      f"mixed_random: bits={bits!r}. Expected several, such as bits=(2,4,6)."
    )
  options: Sequence[choice.Option] = MIXED_OPTIONS
  if bits:
    options = tuple(
      choice.Option(f"int{n}", mode) for n in bits for mode in numerics.MODES
    )
  menu = choice.menu(options, rounding)
  shapes = [tuple(leaf.shape) for leaf in jax.tree.leaves(params)]
  leaves = [choice.leaf(shape, menu) for shape in shapes]
  return codecs.per_leaf("mixed_random", params, leaves)


def _uniform(precision: str) -> Callable[..., Codec]:
  def build(params: Params, **options: Any) -> Codec:
    return from_rules(precision, [QuantRule("*", precision, options)], params)

  return build


# What `--defense` may name: name -> (what it is, constructor).
CODECS: dict[str, tuple[str, Callable[..., Codec]]] = {
  "none": ("no defence: float32 as it is", _uniform("float32")),
  **{name: (what, _uniform(name)) for name, (what, _) in LEAF_CODECS.items()},
  "paper": ("layers take turns between modes, after Ovi et al. 2022", paper),
  "mixed_random": ("a random precision and mode a leaf", mixed_random),
  "budget": ("least error in so many bytes", budget.budget),
  "guarded": ("least predicted leakage in so many bytes", budget.guarded),
}


def make(name: str, params: Params, **options: Any) -> Codec:
  """Builds the codec that a flag or a script names.

  Args:
    name: a name in `CODECS`, or the path of a policy file (`.toml`).
    params: parameters of the model, or a tree of `jax.ShapeDtypeStruct`.
    **options: of that codec; with any, `error_feedback=True` and
      `entropy="zstd"` or `"zstd(level=9)"`.

  Returns:
    The codec.

  Raises:
    UserError: an unknown name, a bad option, or a policy that does not fit the
      model.
  """
  if not jax.tree.leaves(params):
    raise UserError(
      "the parameters have no arrays in them: expected a tree such as a model's"
      " `init` gives."
    )
  feedback = options.pop("error_feedback", False)
  coding = entropy.make(options.pop("entropy", "none"))
  if name in CODECS:
    build = CODECS[name][1]
    _check_options(name, build, options)
    codec = build(params, **options)
  elif name.endswith(".toml"):
    if options:
      raise UserError(
        f"policy file {name}: takes no options, got {', '.join(options)}; write"
        " them into its rules."
      )
    codec = from_rules(*policy.read(pathlib.Path(name)), params, name)
  else:
    raise errors.unknown_name(
      "codec (a policy file would end in .toml)", name, CODECS
    )
  if not isinstance(feedback, bool):
    raise UserError(f"error_feedback={feedback!r}: expected true or false.")
  if feedback:
    codec = codecs.error_feedback(codec)
  return codec if coding is None else entropy.coded(codec, coding)


class CodecState(NamedTuple):
  """What `transformation` keeps: the codec's state, and how often it ran."""

  inner: PyTree
  steps: Array


def transformation(codec: Codec, key: Key) -> optax.GradientTransformation:
  """A codec for somebody else's training loop, as one link of an optax chain.

  Gradients become what a server would have decoded.

  Args:
    codec: built for these parameters.
    key: of the codec's randomness, which differs from step to step.
  """

  def init(params):
    return CodecState(codec.init(params), jnp.zeros((), jnp.int32))

  def update(updates, state, params=None):
    del params
    payload, inner = codec.encode(
      jax.random.fold_in(key, state.steps), updates, state.inner
    )
    decoded = jax.tree.map(
      lambda d, u: d.astype(u.dtype), codec.decode(payload), updates
    )
    return decoded, CodecState(inner, state.steps + 1)

  return optax.GradientTransformation(init, update)


def table(
  codec: Codec, update: Update, key: Key, state: PyTree | None = None
) -> str:
  """What a codec does to an update, a line a leaf.

  Args:
    codec: the codec.
    update: the update to send.
    key: for rounding and random choices.
    state: of the client; None for a new one.

  Returns:
    A table of layer, parameters, rule, bits a parameter, bytes and
    signal-to-noise ratio in dB, with a line for the whole message; below, how
    close to the best a policy's choice for this update provably is.
  """
  if state is None:
    state = codec.init(update)
  payload, _ = jax.jit(codec.encode)(key, update, state)
  decoded = jax.jit(codec.decode)(payload)
  header = ("layer", "parameters", "rule", "bits", "bytes", "SNR dB")
  rows = []
  signal = noise = 0.0
  for record, sent, got in zip(
    codec.records(payload),
    jax.tree.leaves(update),
    jax.tree.leaves(decoded),
    strict=True,
  ):
    x = np.asarray(sent, np.float64)
    lost = float(((x - np.asarray(got)) ** 2).sum())
    energy = float((x**2).sum())
    signal, noise = signal + energy, noise + lost
    rows.append(
      (record.path, x.size, record.rule, record.num_bytes, energy, lost)
    )
  message = codec.pack(payload)
  coding = "entropy coded" if wire.is_coded(message) else ""
  rows.append(
    ("message", trees.size(update), coding, len(message), signal, noise)
  )
  lines = [header]
  for path, count, rule, size, energy, lost in rows:
    bits = 8 * size / count if count else 0.0
    lines.append(
      (path, f"{count:,}", rule, f"{bits:.2f}", f"{size:,}", _db(energy, lost))
    )
  text = "\n".join(columns.aligned(lines, left=(0, 2)))
  if codec.proof is None:
    return text
  objective, gap = codec.proof
  over = float(jax.jit(gap)(update))
  if np.isinf(over):
    return (
      f"{text}\nno choice was found that keeps the bounds: sent with the least"
      " error"
    )
  if over < 1e-6:  # The rounding of float32's sums.
    return f"{text}\n{objective}: the least possible"
  return f"{text}\n{objective}: within {100 * over:.2g}% of the least possible"


def _db(energy: float, lost: float) -> str:
  if lost == 0:
    return "exact"
  return f"{10 * np.log10(energy / lost):.1f}" if energy > 0 else "-"


def _blockwise(
  shape: codecs.Shape,
  numeric: numerics.Numerics,
  granularity: Granularity,
  kernels: str = "xla",
  momentum: float | None = None,
) -> codecs.LeafCodec:
  blocks = _blocks(granularity)
  numerics.require_choice("kernels", kernels, KERNELS)
  passes = None
  if kernels == "native":
    passes = native.passes(numeric, math.prod(shape))
  return codecs.blockwise(shape, numeric, blocks, momentum, passes)


def _blocks(granularity: Granularity) -> Granularity:
  if granularity in ("tensor", "channel"):
    return granularity
  if isinstance(granularity, bool) or not isinstance(granularity, int):
    raise UserError(
      f"granularity={granularity!r}: expected tensor, channel or a number of"
      " entries."
    )
  numerics.require_range("granularity", granularity, 1, 2**31 - 1)
  return granularity


def _check_options(
  name: str, build: Callable, options: Mapping[str, Any]
) -> None:
  known = list(inspect.signature(build).parameters.values())[1:]
  if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known):
    return  # Checked where the options go on to.
  names = [p.name for p in known]
  for option in options:
    if option not in names:
      raise errors.unknown_name(
        f"option of {name}", option, [*names, "error_feedback", "entropy"]
      )
  for p in known:
    if p.default is inspect.Parameter.empty and p.name not in options:
      raise UserError(f"{name}: option {p.name} is missing.")
