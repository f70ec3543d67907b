"""Passes over large leaves in C++, for a CPU on which memory is what limits.

A processor reads a cache line before it stores part of it, unless told not to,
and XLA does not tell it. Where a leaf is larger than the caches, decoding moves
little more than half as much memory by storing past them. `native.cc` has such
passes for codecs that do little else than move memory, with the bits that XLA's
give; JAX's foreign function interface calls them.

XLA cannot fuse what comes before or after with them, as it does with its own
(and then may round a decoded entry and its sum once in place of twice): they
are for large leaves that are encoded and decoded by themselves, not for rounds
of small models. The machine's own compiler makes them once for its processor.
"""

from collections.abc import Callable
import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import tempfile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

from mpqfl_jax import bitpack, host, numerics, quantize
from mpqfl_jax.errors import UserError
from mpqfl_jax.types import Array

_SOURCE = pathlib.Path(__file__).with_name("native.cc")
FUNCTIONS = (
  *("extremes", "to_grid", "from_grid", "from_float8"),
  *("to_float16", "from_float16", "to_bfloat16", "from_bfloat16"),
)
# What a processor must be able to do.
NEEDS = ("avx2", "f16c")
# After the user's: sums and products are as they are written, like XLA's.
_OPTIONS = (
  *("-std=c++17", "-O3", "-march=native", "-mprefer-vector-width=512"),
  *("-fno-fast-math", "-ffp-contract=off"),
  *("-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC"),
)
# Of what a compiler says.
_LINES = 20


class Passes(NamedTuple):
  """What replaces XLA's passes over a leaf that is one block.

  Attributes:
    write: ([entries] float32, side) -> packed codes; None leaves it to XLA.
    read: (packed codes, side) -> [entries] float32.
  """

  write: Callable[[Array, numerics.Side], Array] | None
  read: Callable[[Array, numerics.Side], Array]


def passes(numeric: numerics.Numerics, entries: int) -> Passes:
  """The passes of a leaf. They are compiled here, and JAX's backend starts.

  Args:
    numeric: a cast, or integers of 1, 2, 4 or 8 bits without dither.
    entries: of the leaf.

  Raises:
    UserError: other numerics, and what `load` raises.
  """
  nearest = numeric.rounding == "nearest"
  if numeric.format is not None:
    made = _cast(numeric.format, nearest, entries)
  elif numeric.grid is not None and bitpack.fills_byte(numeric.levels):
    made = _grid(numeric.grid, numeric.levels, nearest, entries)
  else:
    raise UserError(
      f"kernels=native: there are none for {numeric.name}. Expected float16,"
      " bfloat16, float8, int1, int2, int4 or int8 without dither."
    )
  load()
  return made


def extremes(x: Array) -> Array:
  """[2] float32, `quantize.extremes` of an array; zero may have another sign.

  `load` comes first.
  """
  return _call("extremes", (2,), jnp.float32, x.reshape(-1))


@functools.cache
def load() -> None:
  """Compiles the passes, where that has not been done, and registers them.

  Raises:
    UserError: JAX's backend is no CPU, the processor is not of the x86-64 kind
      with AVX2, there is no C++ compiler that can compile them, or no folder
      for the result.
  """
  if jax.default_backend() != "cpu":
    raise UserError(
      "kernels=native: they run on a CPU, and JAX runs on"
      f" {jax.default_backend()} here. Expected kernels=xla."
    )
  if not set(NEEDS) <= set(host.processor_flags()):
    raise UserError(
      "kernels=native: they need a processor with AVX2 (x86-64-v3), and this is"
      f" {host.processor()}, {platform.machine()}. Expected kernels=xla."
    )
  path = _built()
  try:
    library = ctypes.CDLL(str(path))
  except OSError as e:
    raise UserError(
      f"kernels=native: {e}. Expected a library that can be loaded: set"
      " MPQFL_CACHE_DIR to a folder from which programs may run, or CXX to"
      " another compiler."
    ) from e
  for name in FUNCTIONS:
    jax.ffi.register_ffi_target(
      target(name), jax.ffi.pycapsule(getattr(library, name)), platform="cpu"
    )


def target(name: str) -> str:
  """What a function of `FUNCTIONS` is called in a program."""
  return f"mpqfl_jax_{name}"


def _built() -> pathlib.Path:
  """The compiled library, in the cache of this user."""
  compiler = _words("CXX") or _found_compiler()
  program = shutil.which(compiler[0])
  if program is None:
    raise UserError(
      f"kernels=native: there is no C++ compiler {compiler[0]} on the path."
      " Expected kernels=xla, or a compiler such as g++, or its name in CXX."
    )
  command = [*compiler, *_words("CXXFLAGS"), *_OPTIONS]
  command += ["-isystem", jax.ffi.include_dir()]
  parts = [
    _SOURCE.read_text(),
    program,
    *command,
    jaxlib.__version__,
    # `native` is this one; a home folder may be shared.
    *sorted(host.processor_flags()),
  ]
  digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
  path = host.cache_dir() / f"native-{digest}.so"
  try:
    if not path.exists():
      path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
      with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = pathlib.Path(folder) / path.name
        _compile([*command, str(_SOURCE), "-o", str(made)], made)
        # At once: another process may be doing the same.
        made.replace(path)
    owner = path.stat().st_uid
  except OSError as e:
    raise UserError(
      f"kernels=native: {e}. Set MPQFL_CACHE_DIR to a folder that can be"
      " written."
    ) from e
  # It is going to run: nobody else may have put it there.
  if owner not in (0, os.getuid()):
    raise UserError(
      f"kernels=native: {path} belongs to another user. Set MPQFL_CACHE_DIR to"
      " a folder of your own."
    )
  return path


def _compile(command: list[str], made: pathlib.Path) -> None:
  done = subprocess.run(command, capture_output=True, text=True)
  if done.returncode or not made.exists():
    said = "\n".join(done.stderr.splitlines()[:_LINES])
    raise UserError(
      f"kernels=native: {shlex.join(command)} ended with {done.returncode}."
      " Expected kernels=xla, or another compiler or other options in CXX and"
      f" CXXFLAGS.\n{said}"
    )


def _words(variable: str) -> list[str]:
  try:
    return shlex.split(os.environ.get(variable, ""))
  except ValueError as e:
    raise UserError(
      f"{variable}={os.environ[variable]}: {e}. Expected words as in a shell."
    ) from e


def _found_compiler() -> list[str]:
  known = ("c++", "g++", "clang++")
  return [next(filter(shutil.which, known), known[0])]


def _call(
  name: str, shape: tuple[int, ...], dtype: Any, *arrays: Array, **options: Any
) -> Array:
  # Clients side by side are rows of one call.
  return jax.ffi.ffi_call(
    target(name),
    jax.ShapeDtypeStruct(shape, dtype),
    vmap_method="broadcast_all",
  )(*arrays, **options)


def _grid(
  grid: Callable[[numerics.Side], quantize.Grid],
  levels: int,
  nearest: bool,
  entries: int,
) -> Passes:
  def call(name, dtype, array, side):
    scale, zero_point, *_ = grid(side)
    return _call(
      name,
      (entries,),
      dtype,
      array,
      scale.reshape(1),
      zero_point.reshape(1),
      levels=np.int64(levels),
    )

  # To codes that share bytes, arithmetic is the limit, not memory.
  writes = nearest and levels > 128
  return Passes(
    functools.partial(call, "to_grid", jnp.uint8) if writes else None,
    functools.partial(call, "from_grid", jnp.float32),
  )


def _cast(fmt: quantize.FloatFormat, nearest: bool, entries: int) -> Passes:
  name = fmt.dtype.name

  def write(x, side):
    return _call(f"to_{name}", (entries,), jnp.uint16, x)

  def read(codes, side):
    return _call(f"from_{name}", (entries,), jnp.float32, codes)

  def read_scaled(codes, side):
    return _call(
      "from_float8",
      (entries,),
      jnp.float32,
      codes,
      side["scale"].reshape(1),
      mantissa=np.int64(fmt.mantissa),
      unit=fmt.unit,
    )

  if fmt.dtype.itemsize == 1:
    return Passes(None, read_scaled)
  return Passes(write if nearest else None, read)
