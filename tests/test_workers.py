"""Jobs in processes beside one another: all done, errors told, none left."""

import functools
import multiprocessing
import os
import pathlib
import time

from absl import flags
from absl.testing import flagsaver
import jax
import pytest

from experiments import config, workers
from mpqfl_jax import errors


def note(place: pathlib.Path, job: int) -> None:
  """Writes who did a job, on what."""
  cores = sorted(os.sched_getaffinity(0))
  words = f"{os.getpid()} {jax.device_count()} {cores}"
  (place / str(job)).write_text(words)
  # Long enough that nobody does all of them.
  time.sleep(0.2)


def fail(place: pathlib.Path, job: int) -> None:
  if job == 1:
    raise errors.UserError("job one is a mistake")
  if job == 2:
    raise ValueError("job two is a bug")
  if job == 3:
    os._exit(7)
  time.sleep(600)


def test_every_job_is_done_once_on_cores_of_its_own(tmp_path):
  jobs = list(range(12))
  finished = list(workers.each(functools.partial(note, tmp_path), jobs, 2, 1))
  assert sorted(finished) == jobs
  said = {(tmp_path / str(job)).read_text() for job in jobs}
  assert len(said) == 2 and all(words.split()[1] == "1" for words in said)
  if len(os.sched_getaffinity(0)) > 1:
    assert len({words.split(maxsplit=2)[2] for words in said}) == 2
  assert not multiprocessing.active_children()


@pytest.mark.parametrize("task, share", [("study", 3), ("train", 1)])
def test_only_a_study_shares_the_cores(task, share):
  with flagsaver.flagsaver():
    flags.FLAGS(["main", f"--task={task}", "--study_processes=3"])
    want = max(1, os.cpu_count() // share)
    assert config.cpu_devices(flags.FLAGS) == want
    flags.FLAGS.devices = 5
    assert config.cpu_devices(flags.FLAGS) == 5


@pytest.mark.parametrize(
  "job, error, words",
  [
    (1, errors.UserError, "job one is a mistake"),
    (2, RuntimeError, "ValueError: job two is a bug"),
    (3, errors.UserError, r"ended with status 7.*--resume"),
  ],
)
def test_an_error_stops_them_all(job, error, words):
  do = functools.partial(fail, pathlib.Path())
  with pytest.raises(error, match=words):
    list(workers.each(do, [0, job], 2, 1))
  assert not multiprocessing.active_children()
