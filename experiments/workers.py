"""Jobs beside one another, each process with some of the machine's cores.

A small training run makes little use of more than a core or two: tracing,
loading programs and everything between rounds is one thread's work.
"""

from collections.abc import Callable, Iterator, Sequence
import io
import multiprocessing
import os
import queue
import signal
import sys
import traceback
from typing import Any, TypeVar

import jax

from mpqfl_jax import errors

Job = TypeVar("Job")
# How often those who wait look whether the others are still there, seconds.
_LOOK = 2.0


def each(
  do: Callable[[Job], None], jobs: Sequence[Job], processes: int, devices: int
) -> Iterator[Job]:
  """Does every job, as many at a time as there are processes.

  Args:
    do: called in a process of its own; can be pickled, as the jobs can.
    jobs: taken in this order.
    processes: how many.
    devices: CPU devices of each, that is cores.

  Yields:
    The jobs as they are done. Closed early, or at an error, the processes are
    stopped where they are.

  Raises:
    UserError: what a job raised, or a process was killed.
    RuntimeError: another error in a job.
  """
  context = multiprocessing.get_context("spawn")
  taken: Any = context.Value("i", 0)
  done: Any = context.Queue()
  everybody = [
    context.Process(
      target=_serve,
      args=(do, jobs, taken, done, devices, _cores(i, processes, devices)),
      daemon=True,
    )
    for i in range(processes)
  ]
  for process in everybody:
    process.start()
  try:
    for _ in jobs:
      number, error = _next(done, everybody)
      if error is not None:
        raise error
      yield jobs[number]
  finally:
    for process in everybody:
      process.terminate()
    for process in everybody:
      process.join()


def _next(done, everybody) -> tuple[int, Exception | None]:
  while True:
    try:
      return done.get(timeout=_LOOK)
    except queue.Empty:
      for process in everybody:
        if process.exitcode:
          raise errors.UserError(
            f"a process of the study ended with status {process.exitcode},"
            " perhaps for want of memory. --resume goes on; fewer"
            " --study_processes need less of it."
          ) from None


def _cores(number: int, processes: int, devices: int) -> set[int]:
  """The cores of one process, none where there are too few to keep apart."""
  if not hasattr(os, "sched_getaffinity"):
    return set()
  all_cores = sorted(os.sched_getaffinity(0))
  if processes * devices > len(all_cores):
    return set()
  return set(all_cores[number * devices : (number + 1) * devices])


class _NoTerminal(io.TextIOWrapper):
  """A stream on which nobody draws progress bars: the parent draws one."""

  def isatty(self) -> bool:
    return False


def _serve(do, jobs, taken, done, devices: int, cores: set[int]) -> None:
  """What a process does: jobs, until there are none or nobody waits."""
  # An interrupt is the parent's, which then stops this process.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  sys.stderr = _NoTerminal(io.FileIO(os.dup(2), "w"), write_through=True)
  # XLA makes as many threads as there are cores to run on.
  if cores:
    os.sched_setaffinity(0, cores)
  jax.config.update("jax_num_cpu_devices", devices)
  parent = multiprocessing.parent_process()
  assert parent is not None
  while parent.is_alive():
    with taken.get_lock():
      number = taken.value
      taken.value += 1
    if number >= len(jobs):
      return
    error: Exception | None = None
    try:
      do(jobs[number])
    except errors.UserError as e:
      error = e
    except Exception:  # told by the parent, as text: any error can be sent so
      error = RuntimeError(
        f"in a process of its own:\n{traceback.format_exc()}"
      )
    done.put((number, error))
    if error is not None:
      return
  sys.exit(1)
