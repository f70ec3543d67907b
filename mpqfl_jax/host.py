"""Settings of a process, made before JAX starts.

On a CPU they change how fast arrays are made, and nothing else but the last bit
of sums; on a GPU, that a run repeats. Entry points ask for them; a library must
not do it behind its user's back.

glibc maps each array above 32 MB afresh and gives it back when it dies, so that
the kernel clears every page of every result before it is written: for a pass
that only reads and writes, three quarters of the time. A heap that is never
trimmed hands the same pages out again, and in huge pages a processor finds its
way through arrays of megabytes faster. XLA limits its vectors to 256 bits by
default, which halves the speed of loops on processors with AVX-512.

On a GPU, XLA times several ways to compute a product when it compiles and takes
the fastest, which need not be the same one the next time: without the flag that
asks for deterministic operations, a run does not repeat to the bit.
"""

import importlib.util
import os
import pathlib
import platform
import sys

from mpqfl_jax.errors import UserError

# glibc reads these when a process starts.
_ALLOCATOR = {
  "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
  "MALLOC_MMAP_MAX_": "0",
  "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
  "MALLOC_TOP_PAD_": str(64 << 20),
}
_WIDTH = "--xla_cpu_prefer_vector_width"
_DETERMINISTIC = "--xla_gpu_deterministic_ops"
# What JAX's wheels for GPUs install.
_GPU_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin")


def variables(one_arena: bool = False) -> dict[str, str]:
  """The settings as variables of the environment, for a process to be started.

  What the user has set already (one of these flags in `XLA_FLAGS`, any variable
  of glibc's allocator) is left alone.

  Args:
    one_arena: all threads share one heap, which is best where one array is
      made after another; threads that train several clients at a time would get
      in each other's way.
  """
  wanted: dict[str, str] = {}
  if not any(name.startswith(("MALLOC_", "GLIBC_")) for name in os.environ):
    wanted |= _ALLOCATOR
    if one_arena:
      wanted["MALLOC_ARENA_MAX"] = "1"
  flags = os.environ.get("XLA_FLAGS", "")
  if _WIDTH not in flags and "avx512f" in processor_flags():
    flags += f" {_WIDTH}=512"
  if _DETERMINISTIC not in flags and _has_gpu_plugin():
    flags += f" {_DETERMINISTIC}=true"
  if flags != os.environ.get("XLA_FLAGS", ""):
    wanted["XLA_FLAGS"] = flags.strip()
  return wanted


def restart() -> None:
  """Starts this program over with the settings, as the same process.

  Does nothing where they are made already, and where there is no glibc. To be
  called first of all: what the program did until then is lost.
  """
  if not sys.platform.startswith("linux") or not _has_glibc():
    return
  wanted = variables()
  if wanted:
    arguments = [sys.executable, *sys.orig_argv[1:]]
    os.execve(sys.executable, arguments, os.environ | wanted)


def tune() -> None:
  """Sets XLA's flags alone in this process, in which JAX has not started yet.

  For programs that cannot start over.
  """
  flags = variables().get("XLA_FLAGS")
  if flags:
    os.environ["XLA_FLAGS"] = flags


def _has_glibc() -> bool:
  return "CS_GNU_LIBC_VERSION" in os.confstr_names and bool(
    os.confstr("CS_GNU_LIBC_VERSION")
  )


def _has_gpu_plugin() -> bool:
  return any(importlib.util.find_spec(name) for name in _GPU_PLUGINS)


def processor() -> str:
  """The processor's name, for tables of measurements."""
  name = _processor("model name") or platform.processor() or "a processor"
  # Half of the speed depends on it, and virtual machines' names do not tell.
  return f"{name} with AVX-512" if "avx512f" in processor_flags() else name


def processor_flags() -> list[str]:
  """What the processor can do, in Linux's words; [] where that is unknown."""
  return _processor("flags").split()


def _processor(field: str) -> str:
  info = pathlib.Path("/proc/cpuinfo")
  for line in info.read_text().splitlines() if info.exists() else []:
    if line.startswith(field):
      return line.partition(":")[2].strip()
  return ""


def cache_dir() -> pathlib.Path:
  """The folder for what can be made again, which need not exist yet.

  Raises:
    UserError: it is in the home folder of a user who has none.
  """
  own = os.environ.get("MPQFL_CACHE_DIR")
  shared = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  path = pathlib.Path(own or f"{shared}/mpqfl_jax")
  try:
    return path.expanduser()
  except RuntimeError as e:
    raise UserError(
      f"cache folder {path}: {e} Set MPQFL_CACHE_DIR to a folder that can be"
      " written."
    ) from e
