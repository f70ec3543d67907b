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
# Sums and products as they are written, like XLA's.
_OPTIONS = (
  *("-std=c++17", "-O3", "-march=native", "-mprefer-vector-width=512"),
  *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
  *("-shared", "-fPIC"),
)


class Passes(NamedTuple):
  """What replaces XLA's passes over a leaf that is one block.

  Attributes:
    extremes: x -> [2], what side information is fitted to.
    write: ([entries] float32, side) -> packed codes; None leaves it to XLA.
    read: (packed codes, side) -> [entries] float32.
  """

  extremes: Callable[[Array], Array]
  write: Callable[[Array, numerics.Side], Array] | None
  read: Callable[[Array, numerics.Side], Array]


def passes(numeric: numerics.Numerics, entries: int) -> Passes:
  """The passes of a leaf.

  Args:
    numeric: a cast, or integers of 1, 2, 4 or 8 bits without dither.
    entries: of the leaf.

  Raises:
    UserError: other numerics, another backend or processor, no compiler.
  """
  if numeric.format is not None:
    write, read = _cast(numeric.format, entries)
  elif numeric.grid is not None and bitpack.fills_byte(numeric.levels):
    write, read = _grid(numeric.grid, numeric.levels, entries)
  else:
    raise UserError(
      f"kernels=native: there are none for {numeric.name}. Expected float16,"
      " bfloat16, float8, int1, int2, int4 or int8 without dither."
    )
  load()
  if numeric.rounding != "nearest":
    write = None
  return Passes(_extremes, write, read)


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
  if not {"avx2", "f16c"} <= set(host.processor_flags()):
    raise UserError(
      "kernels=native: they need a processor with AVX2 (x86-64-v3), and this is"
      f" {host.processor()}, {platform.machine()}. Expected kernels=xla."
    )
  try:
    library = ctypes.CDLL(str(_built()))
  except OSError as e:
    raise UserError(
      f"kernels=native: {e}. Set MPQFL_CACHE_DIR to a folder in which a library"
      " can be written and run."
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
  compiler = _compiler()
  options = [*_OPTIONS, *shlex.split(os.environ.get("CXXFLAGS", ""))]
  command = [*compiler, *options, "-isystem", jax.ffi.include_dir()]
  parts = [
    _SOURCE.read_text(),
    *command,
    shutil.which(compiler[0]) or "",
    jaxlib.__version__,
    # `native` is this one; a home folder may be shared.
    *sorted(host.processor_flags()),
  ]
  digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
  path = host.cache_dir() / f"native-{digest}.so"
  if path.exists():
    return path
  path.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=path.parent) as folder:
    made = pathlib.Path(folder) / path.name
    done = subprocess.run(
      [*command, str(_SOURCE), "-o", str(made)], capture_output=True, text=True
    )
    if done.returncode:
      raise UserError(
        f"kernels=native: {shlex.join(compiler)} could not compile"
        f" {_SOURCE.name}. Expected kernels=xla, or another compiler in"
        f" CXX.\n{done.stderr}"
      )
    # At once: another process may be doing the same.
    made.replace(path)
  return path


def _compiler() -> list[str]:
  named = shlex.split(os.environ.get("CXX", ""))
  candidates = [named] if named else [["c++"], ["g++"], ["clang++"]]
  for command in candidates:
    if shutil.which(command[0]):
      return command
  raise UserError(
    f"kernels=native: no C++ compiler ({' or '.join(c[0] for c in candidates)})"
    " is on the path. Expected kernels=xla, or a compiler such as g++, or its"
    " name in CXX."
  )


def _call(
  name: str, shape: tuple[int, ...], dtype: Any, *arrays: Array, **options: Any
) -> Array:
  # Clients side by side are rows of one call.
  return jax.ffi.ffi_call(
    target(name),
    jax.ShapeDtypeStruct(shape, dtype),
    vmap_method="broadcast_all",
  )(*arrays, **options)


def _extremes(x: Array) -> Array:
  return _call("extremes", (2,), jnp.float32, x.reshape(-1))


def _grid(
  grid: Callable[[numerics.Side], quantize.Grid], levels: int, entries: int
) -> tuple[Callable | None, Callable]:
  def along(side):
    scale, zero_point, *_ = grid(side)
    return scale.reshape(1), zero_point.reshape(1)

  def write(x, side):
    return _call(
      "to_grid", (entries,), jnp.uint8, x, *along(side), levels=np.int64(levels)
    )

  def read(packed, side):
    return _call(
      "from_grid",
      (entries,),
      jnp.float32,
      packed,
      *along(side),
      levels=np.int64(levels),
    )

  # Codes that share bytes are XLA's: arithmetic limits them, not memory.
  return write if levels > 128 else None, read


def _cast(
  fmt: quantize.FloatFormat, entries: int
) -> tuple[Callable | None, Callable]:
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

  return (write, read) if fmt.dtype.itemsize > 1 else (None, read_scaled)
