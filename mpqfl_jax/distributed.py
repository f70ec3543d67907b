"""Several processes as one run: they join, agree, and notice who is gone.

JAX's own runtime connects them: `jax.distributed`, one mesh over all devices.
It leaves two things open. Where a process dies, the others wait in a collective
until heartbeats run out and are then aborted with a trace of native frames; and
where two were started with other flags, they compute nonsense or hang. So each
process leaves a sign of life in the coordination service every few seconds, and
stops with one line and a status of its own when another's does not come.
"""

from collections.abc import Mapping
import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
from typing import Any, NoReturn

import jax
from jax._src import distributed as jax_distributed

from mpqfl_jax import errors

# The exit status of a process that stops because of another one.
STOPPED = 3

_ROOT = "mpqfl_jax"
_BEAT_SECONDS = 2.0
# Well below the hundred seconds after which JAX's runtime aborts us.
_GONE_SECONDS = 30.0
_JAX_GONE_SECONDS = 100
# Others read a last word within a beat; whoever has the service waits for that.
_LINGER_SECONDS = 6.0


def is_main() -> bool:
  """Whether this process writes the run's folder, prints and attacks."""
  return jax.process_index() == 0


def check_flags(
  address: str | None, num_processes: int | None, process_id: int | None
) -> None:
  """Refuses an incomplete or impossible set of flags.

  Raises:
    UserError: as it says.
  """
  given = {
    "--coordinator_address": address,
    "--num_processes": num_processes,
    "--process_id": process_id,
  }
  if all(value is None for value in given.values()):
    return
  if address == "auto":
    if num_processes is not None or process_id is not None:
      raise errors.UserError(
        "--coordinator_address=auto finds the others by itself. Expected no"
        " --num_processes and no --process_id."
      )
    return
  missing = [name for name, value in given.items() if value is None]
  if missing:
    raise errors.UserError(
      f"{', '.join(missing)} is missing. Expected --coordinator_address,"
      " --num_processes and --process_id together, or"
      " --coordinator_address=auto on a TPU slice, under Slurm or Open MPI."
    )
  assert address is not None
  assert num_processes is not None and process_id is not None
  if not 0 <= process_id < num_processes:
    raise errors.UserError(
      f"--process_id={process_id} with --num_processes={num_processes}."
      f" Expected 0 to {num_processes - 1}, another one for each process."
    )
  host, _, port = address.rpartition(":")
  if not host or not port.isdigit() or not 0 < int(port) < 2**16:
    raise errors.UserError(
      f"--coordinator_address={address}. Expected host:port of process 0, such"
      " as 10.0.0.1:1234."
    )


def join(
  address: str | None,
  num_processes: int | None,
  process_id: int | None,
  seconds: int,
  advice: str,
) -> "Group":
  """Connects this process to the others, before JAX looks for its devices.

  Args:
    address: host:port of process 0, or `auto` where JAX finds the others. The
      three have passed `check_flags`.
    num_processes: of the run; None with `auto`.
    process_id: this one's; None with `auto`.
    seconds: how long to wait for the others.
    advice: what to do when a process is gone, for the one line.

  Raises:
    UserError: the others were not found in time. The runtime still waits for
      them in a thread: end the process with `os._exit`.
  """
  begin = time.monotonic()
  # It would take the signal to terminate for a notice, and run on.
  if hasattr(jax.config, "jax_enable_preemption_service"):
    jax.config.update("jax_enable_preemption_service", False)
  if address != "auto":
    assert address is not None and process_id is not None
    _check_address(address, process_id, seconds)
  left = max(seconds - (time.monotonic() - begin), 1)
  failure: list[BaseException] = []

  def connect():
    try:
      jax.distributed.initialize(
        None if address == "auto" else address,
        num_processes,
        process_id,
        # It aborts the process at its end, so that ours has to come before.
        initialization_timeout=seconds + 60,
        heartbeat_timeout_seconds=_JAX_GONE_SECONDS,
        shutdown_timeout_seconds=int(_GONE_SECONDS),
      )
    except Exception as e:
      failure.append(e)

  who = "the others" if not num_processes else f"all {num_processes} processes"
  late = (
    f"{who} did not join at --coordinator_address={address} within {seconds} s."
    " Start each with the same address and number and with another --process_id"
    " from 0, or wait longer with --join_seconds."
  )

  def aborted():  # as the runtime does where process 0 gave up before us
    print(f"error: {late}", file=sys.stderr)
    _exit(2)

  last_words = _on_abort(aborted)
  thread = threading.Thread(target=connect, daemon=True)
  thread.start()
  thread.join(left)
  if failure:
    raise errors.UserError(
      "this process cannot join the others: "
      + " ".join(str(failure[0]).split())
    ) from failure[0]
  if thread.is_alive():
    raise errors.UserError(late)
  group = Group(advice)
  del last_words  # those of the group are in place
  return group


def _check_address(address: str, process_id: int, seconds: int) -> None:
  """Waits until process 0 listens, or, in process 0, sees that it can."""
  host, _, port = address.rpartition(":")
  where = (host.strip("[]"), int(port))
  begin = time.monotonic()
  while True:
    try:
      if process_id == 0:
        socket.getaddrinfo(*where)
        with socket.create_server(("", where[1])):
          return
      with socket.create_connection(where, timeout=2):
        return
    except socket.gaierror as e:
      raise errors.UserError(
        f"--coordinator_address={address}: no such host ({e.strerror})."
        " Expected the name or address of the host that runs process 0."
      ) from e
    except OSError as e:
      if process_id == 0:
        raise errors.UserError(
          f"--coordinator_address={address}: process 0 cannot listen there"
          f" ({e.strerror}). Expected a free port of its own host."
        ) from e
      if time.monotonic() - begin > seconds:
        raise errors.UserError(
          f"nothing answered at --coordinator_address={address} for {seconds} s"
          f" ({e.strerror or e}). Expected the address of process 0, started"
          " on that host; --join_seconds waits longer."
        ) from e
      time.sleep(0.5)


def agree(topic: str, values: Mapping[str, Any]) -> None:
  """Refuses to go on where the processes of a run differ.

  Args:
    topic: another one for each call.
    values: name -> value, what has to be the same everywhere.

  Raises:
    UserError: in every process, with what differs and where.
  """
  client, count = _client(), jax_distributed.global_state.num_processes
  if client is None or count == 1:
    return
  mine = jax_distributed.global_state.process_id
  client.key_value_set(f"{_ROOT}/{topic}/{mine}", json.dumps(dict(values)))
  # A process that dies meanwhile stops us; the limit is a last resort.
  limit = 3600 * 1000
  told = [
    json.loads(client.blocking_key_value_get(f"{_ROOT}/{topic}/{i}", limit))
    for i in range(count)
  ]
  for other, theirs in enumerate(told):
    differing = [
      f"{name} is {theirs.get(name)!r} there and {told[0].get(name)!r} in"
      " process 0"
      for name in sorted(theirs.keys() | told[0].keys())
      if theirs.get(name) != told[0].get(name)
    ]
    if differing:
      raise errors.UserError(
        f"process {other} of {count} has another {topic}:"
        f" {'; '.join(differing)}. Every process of a run needs the same flags,"
        " data and versions; --process_id and folders may differ."
      )


def leave(group: "Group | None", status: int, reason: str) -> NoReturn:
  """Ends this process after an error of its own, joined or not."""
  if group is not None:
    group.fail(status, reason)
  _exit(status)


def _exit(status: int) -> NoReturn:
  sys.stdout.flush()
  sys.stderr.flush()
  # The usual way out waits at a barrier for others who may never come.
  os._exit(status)


def _client():
  """JAX's client of the coordination service, None in a single process."""
  return jax_distributed.global_state.client


class Group:
  """This process among those of a run: signs of life, and a common end."""

  def __init__(self, advice: str):
    self._client = _client()
    self._index = jax_distributed.global_state.process_id
    self._count = jax_distributed.global_state.num_processes
    self._advice = advice
    self._silent_seconds = 0.0
    self._ending = threading.Lock()
    self._finished = threading.Event()
    self._last_words = _on_abort(self._aborted)
    # As an interrupt from the keyboard: the others are told.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for loop in (self._beat, self._guard):
      threading.Thread(target=loop, daemon=True).start()

  def wait_for_verdict(self) -> None:
    """Gives the signs of life time to tell a dead process from a mistake.

    A collective fails at once where another process dies, long before it is
    certain which. Returns only where all of them are alive.
    """
    time.sleep(_GONE_SECONDS + 6 * _BEAT_SECONDS)
    with self._ending:  # which whoever stops the process holds for good
      return

  def fail(self, status: int, reason: str) -> NoReturn:
    """Ends this process after an error of its own, and tells the others.

    Args:
      status: the exit status.
      reason: one line, printed by the others.
    """
    with self._ending:
      self._tell(f"process {self._index} of {self._count} stopped: {reason}")
      _exit(status)

  def finish(self) -> None:
    """Ends the common run: waits for the others, however long they take."""
    self._set("end", "")
    while len(self._get("end")) < self._count:
      time.sleep(0.2)
    self._finished.set()
    jax.distributed.shutdown()

  def _beat(self) -> None:
    """Leaves signs of life and looks for those of the others."""
    seen: dict[str, str] = {}
    # Counted in beats of ours: whoever was suspended blames nobody.
    missed = [0] * self._count
    number = 0
    while not self._finished.wait(_BEAT_SECONDS):
      number += 1
      try:
        self._set("alive", str(number))
        alive, ends = self._get("alive"), self._get("end")
      except RuntimeError:
        if not self._finished.is_set():
          self._stop(self._gone(0, "its coordination service is lost"))
        return
      self._silent_seconds = 0.0
      for line in ends.values():
        if line:
          self._stop(line)
      for other in range(self._count):
        beat = alive.get(str(other), "")
        missed[other] = missed[other] + 1 if beat == seen.get(str(other)) else 0
        if missed[other] * _BEAT_SECONDS >= _GONE_SECONDS:
          why = f"no sign of life for {_GONE_SECONDS:.0f} s"
          self._stop(self._gone(other, why))
      seen = alive

  def _guard(self) -> None:
    """Notices a coordination service that neither answers nor refuses."""
    while not self._finished.wait(1.0):
      self._silent_seconds += 1.0
      if self._silent_seconds > _GONE_SECONDS + 2 * _BEAT_SECONDS:
        why = f"it has not answered for {_GONE_SECONDS:.0f} s"
        self._stop(self._gone(0, why), tell=False)

  def _aborted(self) -> None:
    """The last words of a process that JAX's runtime aborts.

    It does so at once where the coordination service is lost.
    """
    address = jax_distributed.global_state.coordinator_address or ""
    host, _, port = address.rpartition(":")
    try:
      socket.create_connection((host.strip("[]"), int(port)), 2).close()
      line = "JAX's runtime aborted this process, see above"
    except OSError:
      line = self._gone(0, "its coordination service is lost")
    self._stop(line, tell=False)

  def _gone(self, other: int, why: str) -> str:
    return f"process {other} of {self._count} is gone: {why}"

  def _stop(self, line: str, tell: bool = True) -> NoReturn:
    """Ends this process because of another."""
    with self._ending:
      print(f"error: {line}. {self._advice}", file=sys.stderr, flush=True)
      if tell:
        self._tell(line)
      _exit(STOPPED)

  def _tell(self, line: str) -> None:
    """Leaves a last word; where the service is ours, until it was read."""
    try:
      self._set("end", line)
      begin = time.monotonic()
      while self._index == 0 and time.monotonic() - begin < _LINGER_SECONDS:
        if len(self._get("end")) == self._count:
          return
        time.sleep(0.2)
    except RuntimeError:
      return

  def _set(self, what: str, value: str) -> None:
    key = f"{_ROOT}/{what}/{self._index}"
    self._client.key_value_set(key, value, allow_overwrite=True)

  def _get(self, what: str) -> dict[str, str]:
    found = self._client.key_value_dir_get(f"{_ROOT}/{what}/")
    return {key.rsplit("/", 1)[1]: value for key, value in found}


def _on_abort(handler):
  """Calls `handler` when native code aborts the process.

  Python's own signal handlers would run in the main thread, which is waiting in
  a collective. `abort` is called by the runtime's thread, so that this is an
  ordinary call there and may take the interpreter's lock.
  """
  kind = ctypes.CFUNCTYPE(None, ctypes.c_int)
  native = kind(lambda _: handler())
  install = ctypes.CDLL(None).signal
  install.argtypes, install.restype = (ctypes.c_int, kind), ctypes.c_void_p
  install(signal.SIGABRT, native)
  # Lives as long as the caller keeps it.
  return native
