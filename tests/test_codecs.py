"""What every codec promises, checked for each of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpqfl_jax import precision, trees, wire

PARAMS = {
  "conv1": {"bias": jnp.zeros(12), "kernel": jnp.zeros((5, 5, 3, 12))},
  "conv2": {"bias": jnp.zeros(5), "kernel": jnp.zeros((3, 3, 12, 5))},
  "dense1": {"kernel": jnp.zeros((77, 10))},
  "empty": {"kernel": jnp.zeros((0, 3))},
  "scalar": {"temperature": jnp.float32(0)},
}

CASES = {
  **{name: (name, {}) for name in precision.CODECS},
  **{
    f"int{bits} {mode} {rounding} {granularity}": (
      f"int{bits}",
      {"mode": mode, "rounding": rounding, "granularity": granularity},
    )
    for bits, mode, rounding, granularity in [
      (2, "symmetric", "stochastic", "tensor"),
      (2, "affine", "nearest", "channel"),
      (3, "affine", "dither", 64),
      (4, "symmetric", "dither", "tensor"),
      (4, "affine", "stochastic", "channel"),
      (5, "symmetric", "stochastic", 100),
      (8, "affine", "nearest", "channel"),
      (8, "symmetric", "nearest", "channel"),
      (16, "affine", "stochastic", "tensor"),
    ]
  },
  "float16 stochastic": ("float16", {"rounding": "stochastic"}),
  "bfloat16 stochastic": ("bfloat16", {"rounding": "stochastic"}),
  "float8 e5m2": ("float8", {"format": "e5m2", "granularity": "channel"}),
  "float8 stochastic": ("float8", {"rounding": "stochastic"}),
  "power of two": ("int4", {"power_of_two": True}),
  "sign in groups": ("sign", {"granularity": 32}),
  "qsgd max": ("qsgd", {"norm": "max", "levels": 100}),
  "ternary unclipped": ("ternary", {"clip": float("inf")}),
  "mixed_random stochastic": ("mixed_random", {"rounding": "stochastic"}),
  "prune half": ("prune", {"ratio": 0.5}),
  "prune all": ("prune", {"ratio": 1.0}),
  "topk with feedback": ("topk", {"ratio": 0.05, "error_feedback": True}),
}
cases = pytest.mark.parametrize("case", CASES)

# Sums of squares differ in the last bit with how the compiler fuses them.
INEXACT_SCALE = ("ternary", "qsgd")


def _codec(case):
  name, options = CASES[case]
  return precision.make(name, PARAMS, **options)


def _update(seed=0, scale=0.01):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: jnp.asarray(scale * rng.standard_normal(x.shape), jnp.float32),
    PARAMS,
  )


def _equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@cases
def test_structure_and_dtype(case):
  codec = _codec(case)
  update = _update()
  state = codec.init(PARAMS)
  payload, after = codec.encode(jax.random.key(0), update, state)
  decoded = codec.decode(payload)
  assert jax.tree.structure(decoded) == jax.tree.structure(update)
  assert jax.tree.structure(after) == jax.tree.structure(state)
  for got, sent in zip(
    jax.tree.leaves(decoded), jax.tree.leaves(update), strict=True
  ):
    assert got.shape == sent.shape
    assert got.dtype == jnp.float32


@cases
def test_jit_equals_eager(case):
  codec = _codec(case)
  arguments = jax.random.key(1), _update(), codec.init(PARAMS)
  eager, _ = codec.encode(*arguments)
  jitted, _ = jax.jit(codec.encode)(*arguments)
  if case.split()[0] in INEXACT_SCALE:
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9),
      codec.decode(eager),
      codec.decode(jitted),
    )
  else:
    _equal(eager, jitted)
    _equal(codec.decode(eager), jax.jit(codec.decode)(jitted))


@cases
def test_vmap_equals_loop(case):
  codec = _codec(case)
  updates = [_update(seed) for seed in range(3)]
  keys = jax.random.split(jax.random.key(2), 3)
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *updates)

  @jax.jit
  @jax.vmap
  def batched(key, update):
    payload, _ = codec.encode(key, update, codec.init(PARAMS))
    return codec.decode(payload), codec.num_bytes(payload)

  decoded, sizes = batched(keys, stacked)
  for i, (key, update) in enumerate(zip(keys, updates, strict=True)):
    payload, _ = jax.jit(codec.encode)(key, update, codec.init(PARAMS))
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9),
      jax.tree.map(lambda x: x[i], decoded),
      codec.decode(payload),
    )
    assert int(sizes[i]) == int(codec.num_bytes(payload))


@cases
def test_key_decides(case):
  codec = _codec(case)
  encode = jax.jit(codec.encode)
  state = codec.init(PARAMS)
  first, _ = encode(jax.random.key(3), _update(), state)
  again, _ = encode(jax.random.key(3), _update(), state)
  _equal(first, again)


@cases
def test_zero_update_decodes_to_zero(case):
  codec = _codec(case)
  payload, _ = codec.encode(jax.random.key(4), PARAMS, codec.init(PARAMS))
  assert float(trees.norm(codec.decode(payload))) < 1e-30


@cases
def test_bytes_on_the_wire(case):
  codec = _codec(case)
  for seed in range(3):
    payload, _ = codec.encode(
      jax.random.key(seed), _update(seed), codec.init(PARAMS)
    )
    message = codec.pack(payload)
    size = jax.jit(codec.num_bytes)(payload)
    assert size.shape == () and size.dtype == jnp.int32
    assert int(size) == len(message)
    read = codec.unpack(message)
    _equal(payload, read)
    bits = lambda tree: jax.tree.map(
      lambda x: np.asarray(x).view(np.uint32), tree
    )
    _equal(bits(codec.decode(payload)), bits(codec.decode(read)))
    assert codec.pack(read) == message


@cases
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e30])
def test_update_lies_in_its_bins(case, scale):
  if "feedback" in case:
    pytest.skip("bins bound what was sent, update and residual together")
  codec = _codec(case)
  update = _update(5, scale)
  payload, _ = codec.encode(jax.random.key(5), update, codec.init(PARAMS))
  bins = codec.bins(payload)
  decoded = codec.decode(payload)
  for lower, upper, variance, x, y in zip(
    *map(
      jax.tree.leaves,
      (bins.lower, bins.upper, bins.variance, update, decoded),
    ),
    strict=True,
  ):
    assert lower.shape == upper.shape == variance.shape == x.shape
    assert (lower <= x).all() and (x <= upper).all()
    if case != "randomk":
      assert (lower <= y).all() and (y <= upper).all()
    assert (variance >= 0).all()


@cases
def test_what_is_not_finite_is_sent_finite(case):
  codec = _codec(case)
  bad = [jnp.nan, jnp.inf, -jnp.inf, 3e38, -3e38, 1e-45]
  update = jax.tree.map(
    lambda x: (
      x.reshape(-1)
      .at[: len(bad)]
      .set(jnp.array(bad)[: x.size])
      .reshape(x.shape)
    ),
    _update(),
  )
  payload, _ = codec.encode(jax.random.key(6), update, codec.init(PARAMS))
  decoded = codec.decode(codec.unpack(codec.pack(payload)))
  for leaf in jax.tree.leaves(decoded):
    assert np.isfinite(leaf).all()


def test_every_corruption_is_one_error():
  rng = np.random.default_rng(0)
  for case in CASES:
    codec = _codec(case)
    payload, _ = codec.encode(jax.random.key(7), _update(), codec.init(PARAMS))
    message = codec.pack(payload)
    for _ in range(5):
      broken = bytearray(message)
      broken[rng.integers(len(broken))] ^= 1 << rng.integers(8)
      with pytest.raises(wire.WireError):
        codec.unpack(bytes(broken))
    for cut in (b"", message[:-1], message[: len(message) // 2], message * 2):
      with pytest.raises(wire.WireError):
        codec.unpack(cut)
