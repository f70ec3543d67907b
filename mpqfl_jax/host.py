"""Settings of a process that computes on a CPU, made before JAX starts.

They change how fast arrays are made, and nothing else but the last bit of sums.
Entry points ask for them; a library must not do it behind its user's back.

glibc maps each array above 32 MB afresh and gives it back when it dies, so that
the kernel clears every page of every result before it is written: for a pass
that only reads and writes, three quarters of the time. One arena that is never
trimmed hands the same pages out again. XLA limits its vectors to 256 bits by
default, which halves the speed of loops on processors with AVX-512.
"""

import os
import pathlib
import platform

# glibc reads these when a process starts.
_ALLOCATOR = {
  "MALLOC_ARENA_MAX": "1",
  "MALLOC_MMAP_MAX_": "0",
  "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
  "MALLOC_TOP_PAD_": str(64 << 20),
}
_WIDTH = "--xla_cpu_prefer_vector_width"


def variables() -> dict[str, str]:
  """The settings as variables of the environment, for a process to be started.

  What the user has set already (`XLA_FLAGS` with a vector width, any variable
  of glibc's allocator) is left alone.
  """
  wanted: dict[str, str] = {}
  if not any(name.startswith(("MALLOC_", "GLIBC_")) for name in os.environ):
    wanted |= _ALLOCATOR
  flags = os.environ.get("XLA_FLAGS", "")
  if _WIDTH not in flags and "avx512f" in _processor_flags():
    wanted["XLA_FLAGS"] = f"{flags} {_WIDTH}=512".strip()
  return wanted


def tune() -> None:
  """Lets JAX use all of AVX-512 in this process; it must not have started yet.

  The allocator is left as it is: threads that train several clients at a time
  get in each other's way in a single arena.
  """
  flags = variables().get("XLA_FLAGS")
  if flags:
    os.environ["XLA_FLAGS"] = flags


def processor() -> str:
  """The processor's name, for tables of measurements."""
  return _processor("model name") or platform.processor() or "unknown processor"


def _processor_flags() -> list[str]:
  return _processor("flags").split()


def _processor(field: str) -> str:
  info = pathlib.Path("/proc/cpuinfo")
  for line in info.read_text().splitlines() if info.exists() else []:
    if line.startswith(field):
      return line.partition(":")[2].strip()
  return ""
