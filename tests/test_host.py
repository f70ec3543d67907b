"""The process settings, each in a process of its own."""

import json
import os
import subprocess
import sys

import pytest

from mpqfl_jax import host

# Writes a large array over and over; the kernel counts the pages it cleared.
PROGRAM = """
import json, os, resource, sys
from mpqfl_jax import host
if sys.argv[1] == "tuned":
  host.tune()
import numpy as np
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(16_000_000, np.float32)
before = faults()
for _ in range(5):
  np.ones(16_000_000, np.float32)
flags = os.environ.get("XLA_FLAGS", "")
print(json.dumps({"faults": faults() - before, "flags": flags}))
"""


def run(mode, **environment):
  clean = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(("MALLOC_", "GLIBC_", "XLA_"))
  }
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM, mode],
    capture_output=True,
    text=True,
    check=True,
    env=clean | environment,
  )
  return json.loads(done.stdout)


@pytest.mark.skipif(
  sys.platform != "linux" or os.confstr("CS_GNU_LIBC_VERSION") is None,
  reason="the settings are glibc's",
)
def test_freed_memory_is_used_again():
  # Five arrays of 64 MB: 78,000 pages of 4 kB, or 160 huge ones.
  assert run("plain")["faults"] > 100
  assert run("plain", **host.variables())["faults"] < 50


def test_tuning_sets_the_width_alone(monkeypatch):
  monkeypatch.delenv("XLA_FLAGS", raising=False)
  wide = host.variables().get("XLA_FLAGS", "")
  tuned = run("tuned")
  assert tuned["flags"] == wide
  assert tuned["faults"] > 100


def test_what_the_user_set_stays():
  given = "--xla_cpu_prefer_vector_width=256"
  assert run("tuned", XLA_FLAGS=given)["flags"] == given


RESTARTED = """
import os, sys
from mpqfl_jax import host
host.restart()
print(os.getpid(), sys.argv[1:], host.variables())
"""


def test_a_restart_is_the_same_process_with_the_settings(tmp_path):
  clean = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(("MALLOC_", "GLIBC_", "XLA_"))
  }
  program = tmp_path / "program.py"
  program.write_text(RESTARTED)
  with subprocess.Popen(
    [sys.executable, str(program), "--a=b c", "d"],
    env=clean | {"PYTHONPATH": os.getcwd()},
    stdout=subprocess.PIPE,
    text=True,
  ) as process:
    said = process.communicate()[0]
  assert said == f"{process.pid} ['--a=b c', 'd'] {{}}\n"


def test_variables_leave_what_is_set(monkeypatch):
  monkeypatch.setattr(host, "_GPU_PLUGINS", ())
  monkeypatch.setenv("MALLOC_ARENA_MAX", "3")
  monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_prefer_vector_width=128")
  assert host.variables() == {}


def test_other_flags_are_kept(monkeypatch):
  monkeypatch.setattr(host, "_GPU_PLUGINS", ())
  monkeypatch.setattr(host, "processor_flags", lambda: ["avx512f"])
  monkeypatch.setenv("XLA_FLAGS", "--xla_some_flag=1")
  wanted = host.variables()["XLA_FLAGS"]
  assert wanted == "--xla_some_flag=1 --xla_cpu_prefer_vector_width=512"
  monkeypatch.setattr(host, "processor_flags", list)
  assert "XLA_FLAGS" not in host.variables()


def test_operations_on_a_gpu_are_deterministic(monkeypatch):
  monkeypatch.delenv("XLA_FLAGS", raising=False)
  monkeypatch.setattr(host, "processor_flags", list)
  monkeypatch.setattr(host, "_GPU_PLUGINS", ("json",))
  assert host.variables()["XLA_FLAGS"] == "--xla_gpu_deterministic_ops=true"
  chosen = "--xla_gpu_deterministic_ops=false"
  monkeypatch.setenv("XLA_FLAGS", chosen)
  assert "XLA_FLAGS" not in host.variables()
