"""Messages of every codec, read by a reader written from docs/wire.md alone."""

import functools
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpqfl_jax import defenses, precision
from tests import wire_reader
from tests.wire_reader import AFFINE, SYMMETRIC, Leaf, Refused, Rule

# 13 is a multiple of neither 5 nor 8, 640 of both, 4500 is more than a block
# of a rotation, and groups of 48 leave a shorter last one in both.
SHAPES = {
  "bias": (13,),
  "empty": (0, 3),
  "kernel": (40, 16),
  "large": (3, 3, 10, 50),
  "scalar": (),
}
PARAMS = {path: jnp.zeros(shape) for path, shape in SHAPES.items()}
GROUP = 48
CHOSEN = (
  wire_reader.FLOAT16,
  wire_reader.WITHHELD,
  *(start + bits for start in (SYMMETRIC, AFFINE) for bits in range(1, 9)),
)


def integers(bits, mode, rounding="nearest", block="tensor", **options):
  options |= {"mode": mode, "rounding": rounding, "granularity": block}
  start = AFFINE if mode == "affine" else SYMMETRIC
  dither, power = rounding == "dither", "power_of_two" in options
  rule = Rule((start + bits,), block, dither=dither, power_of_two=power)
  return f"int{bits}", options, rule


def rotated(bits, mode, rounding="nearest", block="tensor"):
  name, options, inner = integers(bits, mode, rounding, block)
  return name, options | {"rotate": True}, Rule((0x0D,), inner=inner)


def blocked(name, tag, block, levels=0, **options):
  if levels:
    options["levels"] = levels
  options["granularity"] = block
  return name, options, Rule((tag,), block, levels=levels)


def kept(name, ratio):
  tag = 0x0B if name == "randomk" else 0x0A
  return name, {"ratio": ratio}, Rule((tag,), ratio=ratio)


def drive(**options):
  return "drive", options, Rule((0x0D,), inner=Rule((0x06,), 4096))


def binomial(trials, **rule):
  options = "".join(f",{key}={value}" for key, value in rule.items())
  rule = Rule(
    (0x0E,), levels=trials + 1, **{"theta": 0.25, "bound": 1.0} | rule
  )
  return f"dp_pbm(trials={trials}{options})", None, rule


def randomised(levels, **rule):
  options = "".join(f",{key}={value}" for key, value in rule.items())
  rule = Rule((0x0F,), levels=levels, **{"margin": 1.0, "bound": 1.0} | rule)
  return f"dp_rqm(levels={levels}{options})", None, rule


# A codec's name, its options (None: a defence's codec), the rule of its leaves.
QUICK = [
  ("none", {}, Rule((0x01,))),
  ("float16", {}, Rule((0x02,))),
  ("bfloat16", {}, Rule((0x03,))),
  blocked("float8", 0x04, "tensor", format="e4m3"),
  blocked("float8", 0x04, "channel", format="e4m3"),
  blocked("float8", 0x05, "tensor", format="e5m2"),
  blocked("float8", 0x05, "channel", format="e5m2"),
  *(integers(b, "symmetric") for b in (2, 3, 4, 5, 6, 7, 8, 16)),
  *(integers(b, "affine") for b in (1, 2, 3, 4, 5, 6, 7, 8, 16)),
  integers(4, "affine", block="channel"),
  integers(16, "affine", block="channel"),
  integers(2, "symmetric", "dither", "tensor"),
  integers(3, "affine", "dither", GROUP),
  integers(4, "symmetric", "dither", "channel"),
  integers(8, "affine", "dither", "tensor"),
  integers(16, "symmetric", "dither", "tensor"),
  integers(4, "symmetric", power_of_two=True),
  rotated(4, "affine", "dither", 64),
  drive(),
  blocked("sign", 0x06, "channel"),
  blocked("ternary", 0x07, "tensor"),
  blocked("nf4", 0x08, GROUP),
  blocked("qsgd", 0x09, "tensor", levels=1, norm="l2"),
  blocked("qsgd", 0x09, "tensor", levels=7, norm="max"),
  blocked("qsgd", 0x09, "tensor", levels=300, norm="max"),
  kept("topk", 0.01),
  kept("prune", 0.5),
  kept("randomk", 0.3),
  ("paper", {}, [Rule((tag,)) for tag in (0x02, 0x38, 0x18, 0x34, 0x02)]),
  ("mixed_random", {}, Rule(CHOSEN)),
  ("guarded", {"bytes": 3000}, Rule(CHOSEN)),
  binomial(16),
  randomised(16),
  ("ternary", {"entropy": "zstd"}, Rule((0x07,))),
]
SLOW = [
  blocked("float8", 0x04, GROUP, format="e4m3"),
  blocked("float8", 0x05, GROUP, format="e5m2"),
  *(
    case
    for bits in (2, 3, 4, 8, 16)
    for mode in ("symmetric", "affine")
    for block in ("tensor", "channel", GROUP)
    if (case := integers(bits, mode, "dither", block)) not in QUICK
  ),
  integers(5, "affine", "dither", "channel"),
  integers(6, "symmetric", "dither"),
  integers(7, "affine", "dither", GROUP),
  integers(4, "symmetric", block=GROUP, power_of_two=True),
  integers(8, "symmetric", block="channel", power_of_two=True),
  rotated(4, "symmetric"),
  rotated(3, "affine", block=GROUP),
  rotated(16, "symmetric", "dither"),
  drive(unbiased=False),
  blocked("sign", 0x06, "tensor"),
  blocked("sign", 0x06, GROUP),
  blocked("ternary", 0x07, "channel"),
  blocked("ternary", 0x07, GROUP),
  blocked("nf4", 0x08, "channel"),
  *(
    case
    for levels in (1, 7, 127, 128, 300, 600)
    for norm in ("l2", "max")
    for block in ("tensor", GROUP)
    if (case := blocked("qsgd", 0x09, block, levels, norm=norm)) not in QUICK
  ),
  kept("topk", 0.6),
  kept("prune", 0.98),
  kept("randomk", 0.0011),
  kept("randomk", 1.0),
  ("withheld", {}, Rule((0x0C,))),
  ("mixed_random", {"rounding": "stochastic"}, Rule(CHOSEN)),
  ("budget", {"bytes": 3000}, Rule(CHOSEN)),
  ("budget", {"bytes": 300}, Rule(CHOSEN)),
  binomial(2, bound=0.1),
  binomial(300, bound=0.1, theta=0.125),
  randomised(3),
  randomised(5, margin=2.5, bound=0.3),
  ("int4", {"entropy": "zstd(level=9)"}, Rule((0x14,))),
]


def name_of(case):
  name, options, _ = case
  return " ".join([name, *(f"{k}={v}" for k, v in (options or {}).items())])


def an_update(seed=0):
  rng = np.random.default_rng(seed)
  return {
    path: jnp.asarray(0.01 * rng.standard_normal(shape), jnp.float32)
    for path, shape in SHAPES.items()
  }


def make(name, options, params):
  if options is None:
    return defenses.make(name, params).codec
  return precision.make(name, params, **options)


def sender(name, options, params):
  """What both sides agree on; update, seed -> message, what it decodes to."""
  codec = make(name, options, params)
  encode, decode = jax.jit(codec.encode), jax.jit(codec.decode)

  def send(update, seed=0):
    payload, _ = encode(jax.random.key(seed), update, codec.init(params))
    decoded = [np.asarray(x) for x in jax.tree.leaves(decode(payload))]
    return codec.pack(payload), decoded

  return codec.agreement, send


def template(rules):
  if isinstance(rules, Rule):
    rules = [rules] * len(SHAPES)
  return [
    Leaf(path, shape, rule)
    for (path, shape), rule in zip(SHAPES.items(), rules, strict=True)
  ]


def is_exact(rule):
  """Whether float64, rounded once, is what float32 arithmetic gives.

  It is where a value is one product, and where what goes into it has at most
  24 bits. Sums (rotations), products of several factors (the mechanisms, a
  reciprocal of p) and 16 bits with 15 of a draw below the point round oftener.
  """
  return rule.tags[0] not in (0x0B, 0x0D, 0x0E, 0x0F) and not (
    rule.dither and rule.tags[0] in (SYMMETRIC + 16, AFFINE + 16)
  )


@pytest.mark.parametrize(
  "case",
  [
    *(pytest.param(case, id=name_of(case)) for case in QUICK),
    *(
      pytest.param(case, id=name_of(case), marks=pytest.mark.slow)
      for case in SLOW
    ),
  ],
)
def test_reads_what_the_codec_decodes(case):
  name, options, rules = case
  agreement, send = sender(name, options, PARAMS)
  coded = options is not None and "entropy" in options
  leaves = template(rules)
  for seed in (0, 1):
    message, decoded = send(an_update(seed), seed)
    assert message[3] >> 4 == coded
    arrays = wire_reader.read(message, agreement, leaves, coded)
    # Of the largest value: twelve sums that round to 2^-24 stay below it.
    slack = 2e-6 * max(np.abs(x).max(initial=0) for x in decoded)
    for got, expected, leaf in zip(arrays, decoded, leaves, strict=True):
      assert got.shape == expected.shape
      if is_exact(leaf.rule):
        np.testing.assert_array_equal(got.astype(np.float32), expected)
      else:
        np.testing.assert_allclose(got, expected, rtol=0, atol=slack)


def test_any_number_of_sparse_entries():
  """Every coding of indices, and no entry; 4096 bounds the string tightly."""
  params = {"large": jnp.zeros(4096)}
  agreement, send = sender("topk", {"ratio": 1.0}, params)
  rng = np.random.default_rng(0)
  order = rng.permutation(4096)
  codings = set()
  for count in (0, 1, 2, 3, 5, 8, 14, 20, 30, 60, 100, 200, 400, 900, 4096):
    update = np.zeros(4096, np.float32)
    update[order[:count]] = rng.standard_normal(count)
    message, (decoded,) = send({"large": jnp.asarray(update)})
    codings.add(message[13])
    leaf = Leaf("large", (4096,), Rule((0x0A,)))
    (got,) = wire_reader.read(message, agreement, [leaf])
    assert struct.unpack("<I", message[9:13]) == (count,)
    np.testing.assert_array_equal(got.astype(np.float32), decoded)
  assert codings == {0xFF, 2, 3, 4, 5, 6, 7, 8, 10}


def test_leaves_are_sorted_key_by_key():
  """a/b stands before a-b, and l/2 before l/10, unlike in sorted strings."""
  update = {
    "l": [jnp.full(1, 2.0 + i) for i in range(11)],
    "a-b": jnp.full(1, 1.0),
    "a": {"b": jnp.full(1, 0.0)},
  }
  agreement, send = sender("none", {}, update)
  message, _ = send(update)
  paths = ["a/b", "a-b", *(f"l/{i}" for i in range(11))]
  leaves = [Leaf(path, (1,), Rule((0x01,))) for path in paths]
  arrays = wire_reader.read(message, agreement, leaves)
  assert [array[0] for array in arrays] == [*range(13)]


@pytest.mark.parametrize("entries", [5880, 8192, 64 * 4096 - 1, 64 * 4096 + 9])
def test_blocks_of_a_rotation(entries):
  """Their last one is smaller, but in a large leaf."""
  params = {"a": jnp.zeros(entries)}
  agreement, send = sender("drive", {}, params)
  update = np.random.default_rng(1).standard_normal(entries)
  message, (decoded,) = send({"a": jnp.asarray(update, jnp.float32)})
  leaf = Leaf("a", (entries,), drive()[2])
  (got,) = wire_reader.read(message, agreement, [leaf])
  np.testing.assert_allclose(got, decoded, atol=1e-5)
  scales = -(-entries // 4096)
  bits = 8 * (len(message) - 12 - 1 - 8 - 1 - 4 * scales)
  assert bits == {5880: 4096 + 2048, 8192: 8192}.get(entries, scales * 4096)


@functools.cache
def a_message():
  agreement, send = sender("int4", {}, PARAMS)
  return send(an_update())[0], agreement, template(Rule((0x14,)))


def with_checksum(body):
  return body + struct.pack("<I", wire_reader.hash_of(body))


def test_refuses_any_flipped_bit():
  message, agreement, leaves = a_message()
  wire_reader.read(message, agreement, leaves)
  for bit in range(8 * len(message)):
    mutant = bytearray(message)
    mutant[bit // 8] ^= 1 << bit % 8
    with pytest.raises(Refused, match=r"magic|version|checksum"):
      wire_reader.read(bytes(mutant), agreement, leaves)


def test_refuses_what_was_not_expected():
  message, agreement, leaves = a_message()
  other = [leaf._replace(rule=Rule((0x34,))) for leaf in leaves]
  narrow = [leaf._replace(shape=leaf.shape[:1]) for leaf in leaves]
  for found, text, template_, why in [
    (message, agreement.replace("int4", "int5", 1), leaves, "fingerprint"),
    (message, agreement, narrow, "agreement"),
    (message, agreement, other, "rule 14"),
    (with_checksum(message[:-4] + b"\0"), agreement, leaves, "left over"),
    (with_checksum(message[:-5]), agreement, leaves, "too short"),
  ]:
    with pytest.raises(Refused, match=why):
      wire_reader.read(found, text, template_)


def test_an_agreement_is_as_the_page_has_it():
  params = {"conv1": {"kernel": jnp.zeros((5, 5, 1, 12))}}
  assert (
    precision.make("int4", params).agreement
    == "int4\nconv1/kernel [5, 5, 1, 12] int4 symmetric nearest"
  )


@pytest.mark.parametrize("values", [[1e20, 3e19, -2e20], [0.0, 0.0, 0.0]])
@pytest.mark.parametrize(
  "case", [drive(), rotated(8, "symmetric"), blocked("sign", 0x06, "tensor")]
)
def test_the_largest_and_the_least(case, values):
  """Rotated entries end at 2^64, and a mean magnitude may be zero."""
  name, options, rule = case
  params = {"a": jnp.zeros(3)}
  agreement, send = sender(name, options, params)
  message, (decoded,) = send({"a": jnp.asarray(values, jnp.float32)})
  (got,) = wire_reader.read(message, agreement, [Leaf("a", (3,), rule)])
  np.testing.assert_allclose(got, decoded, rtol=2e-6, atol=2.0**-120)
