"""Native passes: the bits of XLA's, which other tests hold to their oracles."""

from concurrent import futures
import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from mpqfl_jax import host, native, precision
from mpqfl_jax.errors import UserError

SEED = jnp.array([1, 2], jnp.uint32)
CASES = {
  "float16": ("float16", {}),
  "float16 stochastic": ("float16", {"rounding": "stochastic"}),
  "bfloat16": ("bfloat16", {}),
  "float8": ("float8", {}),
  "float8 e5m2": ("float8", {"format": "e5m2"}),
  "int1": ("int1", {}),
  "int2": ("int2", {}),
  "int2 affine": ("int2", {"mode": "affine"}),
  "int4": ("int4", {}),
  "int8": ("int8", {}),
  "int8 affine": ("int8", {"mode": "affine"}),
  "int8 stochastic": ("int8", {"mode": "affine", "rounding": "stochastic"}),
  "int8 power of two": ("int8", {"power_of_two": True}),
  "int8 static": ("int8", {"range": "static"}),
}
needs_library = pytest.mark.usefixtures("compiled")
cases = pytest.mark.parametrize("case", CASES)
# One that writes and one that reads planes.
some = pytest.mark.parametrize("case", ["int8 affine", "int2"])


@pytest.fixture(scope="module")
def compiled():
  try:
    native.load()
  except UserError as e:
    pytest.skip(str(e))


def pair(case, shape):
  """The codec of a leaf, by XLA and by native passes."""
  name, options = CASES[case]
  return [
    precision.leaf_codec(name, shape, options | {"kernels": kernels})
    for kernels in precision.KERNELS
  ]


def assert_same_bits(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    x, y = np.asarray(x), np.asarray(y)
    assert x.dtype == y.dtype and x.shape == y.shape
    assert x.tobytes() == y.tobytes()


def normal(*shape, scale=0.01):
  rng = np.random.default_rng(0)
  return (scale * rng.standard_normal(shape)).astype(np.float32)


def hard_arrays(n):
  """Arrays of n entries where rounding, clamping or flushing matter."""
  rng = np.random.default_rng(1)
  x = normal(n)
  yield x
  yield -np.abs(x)
  yield np.zeros_like(x)
  # Ties of every grid and format: few bits each.
  yield (rng.integers(-512, 512, n) / 512).astype(np.float32)
  yield np.append(x[1:] * 0, np.float32(1)) * np.float32(-0.0)
  for scale in (1e-36, 1e-38, 1e-41, 1e38):
    # What overflows saturates.
    with np.errstate(over="ignore"):
      yield (x * np.float64(scale) * 100).astype(np.float32)
  for special in (np.nan, -np.nan, np.inf, -np.inf):
    yield np.append(x[1:], np.float32(special))
  yield rng.integers(0, 2**32, n, dtype=np.uint32).view(np.float32)


@needs_library
@cases
def test_payloads_and_values_are_those_of_xla(case):
  n = 4099  # No multiple of what fills a byte, a vector or a cache line.
  xla, ours = pair(case, (n,))
  encode = [jax.jit(leaf.encode) for leaf in (xla, ours)]
  decode = [jax.jit(leaf.decode) for leaf in (xla, ours)]
  for x in hard_arrays(n):
    x = jnp.asarray(x)
    (payload, state), (payload2, state2) = (
      f(SEED, x, xla.init()) for f in encode
    )
    assert_same_bits(payload, payload2)
    # Zero may have another sign.
    np.testing.assert_array_equal(state, state2)
    assert_same_bits(*(f(payload) for f in decode))
    assert_same_bits(xla.bins(payload), ours.bins(payload))


@needs_library
@cases
@pytest.mark.parametrize("shape", [(), (1,), (5, 9), (3, 5, 7, 11)])
def test_any_shape(case, shape):
  xla, ours = pair(case, shape)
  x = jnp.asarray(normal(*shape))
  sent = [jax.jit(c.encode)(SEED, x, c.init()) for c in (xla, ours)]
  assert_same_bits(*sent)
  values = [jax.jit(c.decode)(sent[0][0]) for c in (xla, ours)]
  assert values[1].shape == shape
  assert_same_bits(*values)
  assert xla.pack(sent[0][0]) == ours.pack(sent[1][0])


@needs_library
@cases
def test_whatever_a_server_reads(case):
  """Codes that no encoder writes, at all ends of what a record may hold."""
  xla, ours = pair(case, (1, 40_000))
  rng = np.random.default_rng(2)
  payload = jax.jit(xla.encode)(SEED, normal(1, 40_000), xla.init())[0]
  codes = payload["codes"]
  # Of three-valued codes a byte holds fewer than 256.
  limit = 3**5 if case == "int2" else np.iinfo(codes.dtype).max + 1
  codes = rng.integers(0, limit, codes.size).astype(codes.dtype)
  if codes.dtype == np.uint16:
    codes &= {"float16": 0xFBFF, "bfloat16": 0xFEFF}[case.split()[0]]
  payload |= {"codes": codes}
  sides = {
    "scale": [2.0**-126, 1e-30, 0.3, 1e30],
    "exponent": [1, 100, 200],
    "zero_point": [0, 1],
  }
  for name in payload.keys() & sides.keys():
    for value in sides[name]:
      side = np.full_like(payload[name], value)
      values = [jax.jit(c.decode)(payload | {name: side}) for c in (xla, ours)]
      assert_same_bits(*values)
  assert_same_bits(*(jax.jit(c.decode)(payload) for c in (xla, ours)))


@needs_library
@cases
def test_large_leaves(case):
  """Stored past the caches: by several threads, in tiles, with short ends."""
  n = 9_000_017
  xla, ours = pair(case, (n,))
  x = jnp.asarray(normal(n)).at[n // 3].set(jnp.float32(-1.5))
  sent = [jax.jit(c.encode)(SEED, x, c.init()) for c in (xla, ours)]
  assert_same_bits(*sent)
  payload = sent[0][0]
  assert_same_bits(*(jax.jit(c.decode)(payload) for c in (xla, ours)))


@needs_library
@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [0, 299_999, 600_000])
def test_no_thread_overlooks_what_is_not_finite(special, where):
  x = jnp.asarray(normal(600_001)).at[where].set(special)
  xla, ours = pair("int8 affine", x.shape)
  sent = [jax.jit(c.encode)(SEED, x, ()) for c in (xla, ours)]
  assert_same_bits(*sent)


@needs_library
@some
@pytest.mark.parametrize(
  "shape",
  [
    (2, 5, 13, 21),
    # Threads take several rows, cut rows, or parts of rows.
    (2, 3000, 1, 17),
    (1, 3, 1, 100_003),
    (1, 1, 1, 200_001),
  ],
)
def test_clients_side_by_side(case, shape):
  xla, ours = pair(case, shape[2:])
  x = jnp.asarray(normal(*shape))
  x *= jnp.arange(1.0, shape[1] + 1)[:, None, None]

  def both_ways(leaf):
    def one(x):
      payload, _ = leaf.encode(SEED, x, leaf.init())
      return payload, leaf.decode(payload)

    return jax.jit(jax.vmap(jax.vmap(one)))(x)

  assert_same_bits(both_ways(xla), both_ways(ours))


@needs_library
@some
def test_in_loops_and_over_devices(case):
  xla, ours = pair(case, (77,))
  x = jnp.asarray(normal(16, 77))

  def rounds(leaf):
    def one(total, x):
      payload, _ = leaf.encode(SEED, x, leaf.init())
      value = leaf.decode(payload)
      return jnp.maximum(total, value), (payload, value)

    mesh = Mesh(jax.devices(), "clients")
    over = jax.shard_map(
      lambda x: jax.lax.scan(one, x[0] * 0, x)[1],
      mesh=mesh,
      in_specs=P("clients"),
      out_specs=P("clients"),
    )
    return jax.jit(over)(x), jax.lax.scan(one, jnp.zeros(77), x)

  assert_same_bits(rounds(xla), rounds(ours))


@needs_library
def test_calls_at_once_do_not_wait_for_one_another():
  """Each call takes a thread of the pool, and none may be left for helpers."""
  n = 3_000_001
  _, ours = pair("int8", (n,))
  x = jnp.asarray(normal(n))
  encode, decode = jax.jit(ours.encode), jax.jit(ours.decode)
  payload, _ = encode(SEED, x, ())
  value = decode(payload)

  def call(i):
    sent, _ = encode(SEED, x, ())
    return jax.block_until_ready((sent, decode(sent)))

  with futures.ThreadPoolExecutor(16) as pool:
    for sent, got in pool.map(call, range(64)):
      assert_same_bits((sent, got), (payload, value))


@needs_library
def test_messages_do_not_say_who_wrote_them():
  params = {"kernel": jnp.zeros((30, 7)), "bias": jnp.zeros(7)}
  update = {"kernel": normal(30, 7), "bias": normal(7)}
  one, two = (
    precision.make("int8", params, kernels=kernels)
    for kernels in precision.KERNELS
  )
  assert one.agreement == two.agreement
  key = jax.random.key(0)
  message = one.pack(one.encode(key, update, one.init(params))[0])
  assert message == two.pack(two.encode(key, update, two.init(params))[0])
  assert_same_bits(
    one.decode(one.unpack(message)), two.decode(two.unpack(message))
  )


@needs_library
def test_passes_are_native_where_they_are_said_to_be():
  """Equal bits would also come out if `kernels` did nothing."""
  x = jnp.zeros(100)
  expected = {
    "float16": ("to_float16", "from_float16"),
    "bfloat16": ("to_bfloat16", "from_bfloat16"),
    "float8": ("extremes", "from_float8"),
    "int4": ("extremes", "from_grid"),
    "int8": ("extremes", "to_grid", "from_grid"),
    "int8 stochastic": ("extremes", "from_grid"),
  }
  for case, names in expected.items():
    xla, ours = pair(case, x.shape)

    def both_ways(x, leaf):
      payload, _ = leaf.encode(SEED, x, leaf.init())
      return payload, leaf.decode(payload)

    text = [
      jax.jit(functools.partial(both_ways, leaf=leaf)).lower(x).as_text()
      for leaf in (xla, ours)
    ]
    called = {
      name for name in native.FUNCTIONS if native.target(name) in text[1]
    }
    assert called == set(names), case
    assert "mpqfl_jax" not in text[0]


@needs_library
@pytest.mark.parametrize(
  ("name", "options", "said"),
  [
    ("int8", {"granularity": "channel"}, "expected tensor"),
    ("int8", {"granularity": 64}, "expected tensor"),
    ("int8", {"rotate": True}, "rotate=False"),
    ("int8", {"rounding": "dither"}, "without dither"),
    ("int3", {}, "int1, int2, int4 or int8"),
    ("int16", {}, "int1, int2, int4 or int8"),
  ],
)
def test_what_has_no_native_passes_is_refused(name, options, said):
  with pytest.raises(UserError, match=said):
    precision.leaf_codec(name, (10, 20), options | {"kernels": "native"})


@needs_library
def test_blocks_of_a_whole_leaf_are_none_of_many():
  for granularity in ("channel", 10):
    options = {"kernels": "native", "granularity": granularity}
    assert precision.leaf_codec("int8", (10,), options).name


def test_names_of_kernels():
  with pytest.raises(UserError, match="expected one of xla, native"):
    precision.leaf_codec("int8", (10,), {"kernels": "cuda"})
  with pytest.raises(UserError, match="unknown option of nf4 'kernels'"):
    precision.leaf_codec("nf4", (10,), {"kernels": "native"})


def test_an_accelerator_is_refused(monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  with pytest.raises(UserError, match="JAX runs on gpu here"):
    native.load.__wrapped__()


def test_a_processor_without_vectors_is_refused(monkeypatch):
  monkeypatch.setattr(host, "processor_flags", list)
  with pytest.raises(UserError, match="AVX2"):
    native.load.__wrapped__()


PROGRAM = """
import sys
import jax, jax.numpy as jnp, numpy as np
from mpqfl_jax import errors, precision
x = jnp.asarray(np.random.default_rng(0).standard_normal(50_001), jnp.float32)
try:
  for name in ("int8", "int2", "float16", "bfloat16", "float8"):
    xla, native = (
      precision.leaf_codec(name, x.shape, {"kernels": kernels})
      for kernels in ("xla", "native")
    )
    seed = jnp.zeros(2, jnp.uint32)
    one, two = (jax.jit(c.encode)(seed, x, ())[0] for c in (xla, native))
    assert all(np.array_equal(one[part], two[part]) for part in one)
    assert np.array_equal(jax.jit(xla.decode)(one), jax.jit(native.decode)(one))
except errors.UserError as e:
  sys.exit(f"refused: {e}")
"""


def start(tmp_path, **environment):
  return subprocess.Popen(
    [sys.executable, "-c", PROGRAM],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env=os.environ | {"MPQFL_CACHE_DIR": str(tmp_path)} | environment,
  )


@needs_library
def test_processes_that_compile_at_once(tmp_path):
  both = [start(tmp_path), start(tmp_path)]
  for process in both:
    _, said = process.communicate()
    assert process.returncode == 0, said
  assert len(list(tmp_path.iterdir())) == 1


@needs_library
@pytest.mark.slow
def test_without_avx_512(tmp_path):
  narrow = start(
    tmp_path,
    CXXFLAGS="-mno-avx512f",
    XLA_FLAGS="--xla_cpu_max_isa=AVX2",
  )
  _, said = narrow.communicate()
  assert narrow.returncode == 0, said


def assert_refused(tmp_path, environment, said):
  process = start(tmp_path, **environment)
  _, errors = process.communicate()
  assert process.returncode == 1
  assert errors.startswith("refused: ") and said in errors
  assert not tmp_path.exists() or not list(tmp_path.iterdir())


@pytest.mark.skipif(
  not set(native.NEEDS) <= set(host.processor_flags()),
  reason="a processor that is refused before anything is compiled",
)
@pytest.mark.parametrize(
  ("environment", "said"),
  [
    ({"CXX": "/nowhere/c++"}, "no C++ compiler /nowhere/c++"),
    ({"CXX": "false"}, "ended with 1"),
    ({"CXX": "true"}, "ended with 0"),
    ({"CXX": "'c++"}, "CXX='c++: No closing quotation."),
  ],
)
def test_no_compiler_no_traceback(tmp_path, environment, said):
  assert_refused(tmp_path, environment, said)


@needs_library
@pytest.mark.parametrize(
  "folder", ["/dev/null/cache", "~nobody_of_that_name/x"]
)
def test_no_folder_no_traceback(tmp_path, folder):
  environment = {"MPQFL_CACHE_DIR": folder}
  assert_refused(tmp_path, environment, "Set MPQFL_CACHE_DIR")
