"""What every codec promises, checked for each of them."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpqfl_jax import defenses, precision, trees, types, wire

PARAMS = {
  "conv1": {"bias": jnp.zeros(5), "kernel": jnp.zeros((3, 3, 7, 5))},
  "dense1": {"kernel": jnp.zeros((41, 10))},
  # Cut in rows, as a whole and by channels.
  "dense2": {"kernel": jnp.zeros((40, 16))},
  "empty": {"kernel": jnp.zeros((0, 3))},
  "scalar": {"temperature": jnp.float32(0)},
}

OPTIONS = {
  "budget": {"bytes": 500},
  "guarded": {"bytes": 1000, "max_error": 0.05},
}
CASES = {
  **{name: (name, OPTIONS.get(name, {})) for name in precision.CODECS},
  **{
    f"int{bits} {mode} {rounding} {granularity}": (
      f"int{bits}",
      {"mode": mode, "rounding": rounding, "granularity": granularity},
    )
    for bits, mode, rounding, granularity in [
      (2, "symmetric", "stochastic", "tensor"),
      (3, "affine", "dither", 64),
      (4, "symmetric", "dither", "tensor"),
      (4, "affine", "stochastic", "channel"),
      (8, "affine", "nearest", "channel"),
      (16, "affine", "stochastic", "tensor"),
    ]
  },
  "float16 stochastic": ("float16", {"rounding": "stochastic"}),
  "bfloat16 stochastic": ("bfloat16", {"rounding": "stochastic"}),
  "float8 e5m2": ("float8", {"format": "e5m2", "granularity": "channel"}),
  "float8 stochastic": ("float8", {"rounding": "stochastic"}),
  "int4 power of two": ("int4", {"power_of_two": True}),
  "int8 static": ("int8", {"range": "static"}),
  "int4 rotated": ("int4", {"rotate": True, "granularity": 64}),
  "sign in groups": ("sign", {"granularity": 32}),
  "qsgd max": ("qsgd", {"norm": "max", "levels": 300}),
  "ternary unclipped": ("ternary", {"clip": float("inf")}),
  "mixed_random stochastic": ("mixed_random", {"rounding": "stochastic"}),
  "prune half": ("prune", {"ratio": 0.5}),
  "prune all": ("prune", {"ratio": 1.0}),
  "topk with feedback": ("topk", {"ratio": 0.05, "error_feedback": True}),
  "sign with feedback": ("sign", {"error_feedback": True}),
  # Spec and nothing else: the codecs of defences.
  "dp_pbm": ("dp_pbm", None),
  "dp_pbm(bound=0.1,trials=300)": ("dp_pbm(bound=0.1,trials=300)", None),
  "dp_rqm": ("dp_rqm", None),
  "dp_rqm(levels=5)": ("dp_rqm(levels=5)", None),
}
# Compiling takes the time: the quick run has each way of computing a payload
# once, the slow one has all cases.
QUICK = {
  *("none", "float16", "int2", "sign", "ternary", "nf4", "drive", "prune"),
  *("randomk", "mixed_random", "budget", "int3 affine dither 64"),
  *("int8 static", "int4 affine stochastic channel", "topk with feedback"),
  *("dp_pbm", "dp_rqm(levels=5)"),
}
cases = pytest.mark.parametrize(
  "case",
  [
    case if case in QUICK else pytest.param(case, marks=pytest.mark.slow)
    for case in CASES
  ],
)
# The same for what has to be compiled again.
EAGER = (
  "int4 affine stochastic channel",
  "int3 affine dither 64",
  "int8 static",
  "mixed_random",
  "prune",
  "sign",
)


class Case(NamedTuple):
  """A codec with its functions compiled."""

  codec: types.Codec
  encode: object
  read: object


@functools.cache
def built(case):
  name, options = CASES[case]
  if options is None:
    codec = defenses.make(name, PARAMS).codec
  else:
    codec = precision.make(name, PARAMS, **options)
  read = jax.jit(lambda p: (codec.decode(p), codec.num_bytes(p), codec.bins(p)))
  return Case(codec, jax.jit(codec.encode), read)


def an_update(seed=0, scale=0.01):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: jnp.asarray(scale * rng.standard_normal(x.shape), jnp.float32),
    PARAMS,
  )


def sent(case, update, key=0):
  encode, codec = built(case).encode, built(case).codec
  return encode(jax.random.key(key), update, codec.init(PARAMS))[0]


def assert_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a, b):
  # Sums in another order move scales by a bit.
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-8), a, b
  )


def bits_of(tree):
  return jax.tree.map(lambda x: np.asarray(x).view(np.uint32), tree)


@cases
def test_structure_dtype_and_state(case):
  codec, encode, read = built(case)
  update = an_update()
  state = codec.init(PARAMS)
  payload, after = encode(jax.random.key(0), update, state)
  assert jax.tree.structure(after) == jax.tree.structure(state)
  for old, new in zip(
    jax.tree.leaves(state), jax.tree.leaves(after), strict=True
  ):
    assert old.shape == new.shape and old.dtype == new.dtype
  decoded, _, bins = read(payload)
  for tree in (decoded, bins.lower, bins.upper, bins.variance):
    assert jax.tree.structure(tree) == jax.tree.structure(update)
    for got, x in zip(
      jax.tree.leaves(tree), jax.tree.leaves(update), strict=True
    ):
      assert got.shape == x.shape and got.dtype == jnp.float32
  flags = jax.tree.leaves(codec.bins(payload).stochastic)
  assert all(isinstance(flag, bool) for flag in flags)


@pytest.mark.parametrize("case", EAGER)
def test_jit_equals_eager(case):
  codec, encode, read = built(case)
  arguments = jax.random.key(1), an_update(), codec.init(PARAMS)
  eager, _ = codec.encode(*arguments)
  jitted, _ = encode(*arguments)
  assert_equal(eager, jitted)
  assert_equal(bits_of(codec.decode(eager)), bits_of(read(jitted)[0]))


@pytest.mark.parametrize(
  "case",
  [
    case if case in EAGER else pytest.param(case, marks=pytest.mark.slow)
    for case in CASES
  ],
)
def test_vmap_equals_loop(case):
  codec, _, read = built(case)
  updates = [an_update(seed) for seed in range(2)]
  keys = [jax.random.key(seed) for seed in range(2)]
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *updates)

  @jax.jit
  @jax.vmap
  def batched(key, update):
    payload, _ = codec.encode(key, update, codec.init(PARAMS))
    return codec.decode(payload), codec.num_bytes(payload)

  decoded, sizes = batched(jnp.stack(keys), stacked)
  for i, update in enumerate(updates):
    one, size, _ = read(sent(case, update, i))
    assert_close(jax.tree.map(lambda x, i=i: x[i], decoded), one)
    assert int(sizes[i]) == int(size)


@pytest.mark.parametrize(
  "case",
  [
    case
    if case in ("int8 static", "topk with feedback", "mixed_random")
    else pytest.param(case, marks=pytest.mark.slow)
    for case in CASES
  ],
)
def test_scan_equals_loop(case):
  """A client's rounds in one program, which carries its state along."""
  codec, encode, read = built(case)
  updates = [an_update(seed) for seed in range(3)]
  keys = [jax.random.key(seed) for seed in range(3)]

  def round_(state, sent):
    payload, state = codec.encode(*sent, state)
    return state, (codec.decode(payload), codec.num_bytes(payload))

  state = codec.init(PARAMS)
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *updates)
  last, (decoded, sizes) = jax.jit(
    lambda state, sent: jax.lax.scan(round_, state, sent)
  )(state, (jnp.stack(keys), stacked))
  for i in range(3):
    payload, state = encode(keys[i], updates[i], state)
    one, size, _ = read(payload)
    assert_close(jax.tree.map(lambda x, i=i: x[i], decoded), one)
    assert int(sizes[i]) == int(size)
  assert_close(last, state)


@cases
def test_key_decides(case):
  assert_equal(sent(case, an_update(), 3), sent(case, an_update(), 3))


@cases
def test_zero_update_decodes_to_zero(case):
  if case.startswith("dp_"):
    pytest.skip("what hides an update hides that it is zero")
  decoded, _, _ = built(case).read(sent(case, PARAMS))
  assert float(trees.norm(decoded)) < 1e-30


@cases
def test_bytes_on_the_wire(case):
  codec, _, read = built(case)
  for seed in range(2):
    payload = sent(case, an_update(seed), seed)
    message = codec.pack(payload)
    decoded, size, _ = read(payload)
    assert size.shape == () and size.dtype == jnp.int32
    assert int(size) == len(message)
    received = codec.unpack(message)
    assert_equal(payload, received)
    assert_equal(bits_of(decoded), bits_of(read(received)[0]))
    assert codec.pack(received) == message
    records = codec.records(payload)
    assert [r.path for r in records] == trees.leaf_names(PARAMS)
    total = sum(record.num_bytes for record in records)
    assert total + wire.OVERHEAD == len(message)


@cases
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e30])
def test_update_lies_in_its_bins(case, scale):
  update = an_update(5, scale)
  decoded, _, bins = built(case).read(sent(case, update, 5))
  for lower, upper, variance, x, y in zip(
    *map(jax.tree.leaves, (*bins[:3], update, decoded)), strict=True
  ):
    # The first update of a client carries no residual.
    assert (lower <= x).all() and (x <= upper).all()
    assert (variance >= 0).all()
    if case != "randomk":  # decodes to the scaled value, knows the exact one
      assert (lower <= y).all() and (y <= upper).all()


@cases
def test_what_is_not_finite_is_sent_finite(case):
  bad = np.array([np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-45], np.float32)

  def spoil(x):
    flat = np.array(x).reshape(-1)
    flat[: len(bad)] = bad[: flat.size]
    return jnp.asarray(flat.reshape(x.shape))

  codec, _, read = built(case)
  payload = sent(case, jax.tree.map(spoil, an_update()))
  decoded, _, _ = read(codec.unpack(codec.pack(payload)))
  for leaf in jax.tree.leaves(decoded):
    assert np.isfinite(leaf).all()


@cases
def test_every_corruption_is_one_error(case):
  rng = np.random.default_rng(0)
  codec = built(case).codec
  message = codec.pack(sent(case, an_update()))
  for _ in range(20):
    broken = bytearray(message)
    broken[rng.integers(len(broken))] ^= 1 << rng.integers(8)
    with pytest.raises(wire.WireError):
      codec.unpack(bytes(broken))
  for cut in (b"", message[:-1], message[: len(message) // 2], message * 2):
    with pytest.raises(wire.WireError):
      codec.unpack(cut)


def test_another_model_or_policy_is_refused():
  message = built("int8").codec.pack(sent("int8", an_update()))
  other = jax.tree.map(lambda x: x, PARAMS)
  other["dense1"]["kernel"] = jnp.zeros((10, 41))
  for codec in (
    precision.make("int8", other),
    precision.make("int8", PARAMS, mode="affine"),
    precision.make("int8", PARAMS, rounding="stochastic"),
    precision.make("int7", PARAMS),
  ):
    with pytest.raises(wire.WireError, match="fingerprint"):
      codec.unpack(message)


def test_a_batch_of_payloads_is_not_packed():
  codec = built("int8").codec
  payload = sent("int8", an_update())
  batch = jax.tree.map(lambda x: jnp.stack([x, x]), payload)
  with pytest.raises(ValueError, match="batch"):
    codec.pack(batch)


def test_error_feedback_sends_everything_in_the_end():
  # With a constant update, the mean of what is decoded tends to it: what was
  # lost before is in the residual, and the residual stays bounded.
  codec, encode, read = built("topk with feedback")
  update = an_update()
  state = codec.init(PARAMS)
  total = jax.tree.map(jnp.zeros_like, PARAMS)
  rounds = 200
  for i in range(rounds):
    payload, state = encode(jax.random.key(i), update, state)
    total = trees.add(total, read(payload)[0])
  mean = trees.scale(1 / rounds, total)
  lost = trees.norm(trees.subtract(mean, update)) / trees.norm(update)
  assert lost < 0.1
  # Exactly: what was sent and what remains add up to what went in.
  whole = trees.add(total, state[0])
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, rounds * b, rtol=1e-3, atol=1e-5
    ),
    whole,
    update,
  )


@pytest.mark.parametrize(
  ("entries", "group"),
  [(60, 32), (61, 4), (64, 32), (72, 8), (128, 16), (45, 24), (1024, 64)],
)
def test_groups_with_and_without_padding(entries, group):
  params = {"a": jnp.zeros(entries)}
  x = np.random.default_rng(0).standard_normal(entries).astype(np.float32)
  for rounding, steps in (("nearest", 0.5), ("stochastic", 1.0)):
    codec = precision.make("int4", params, granularity=group, rounding=rounding)
    payload, _ = codec.encode(jax.random.key(1), {"a": x}, codec.init(params))
    message = codec.pack(payload)
    assert len(message) == codec.num_bytes(payload)
    got = np.asarray(codec.decode(codec.unpack(message))["a"])
    for start in range(0, entries, group):
      part = slice(start, start + group)
      scale = np.abs(x[part]).max() / 7
      worst = np.abs(got[part] - x[part]).max()
      assert worst <= steps * scale * (1 + 1e-5)
