"""A run that dies goes on and ends as one that did not."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from experiments import folder
from tests.test_experiments import SMALL, execute, lines

RUN = (
  *SMALL,
  "--rounds=4",
  "--checkpoint_every=1",
  "--cohort_size=4",
  "--defense=int4,dp_gaussian",
  "--attack=dlg(iterations=2)",
  "--attack_rounds=1,3",
  "--server_optimizer=adam",
)


def _ends(run: pathlib.Path):
  """What must not depend on where a run was cut: all but times."""
  summary = json.loads((run / "summary.json").read_text())
  metrics = lines(run / "metrics.jsonl")
  attacks = lines(run / "attacks.jsonl")
  for line in metrics + attacks:
    line.pop("seconds")
  for entry in summary["defenses"].values():
    entry.pop("seconds")
    entry.pop("compile_seconds")
  order = sorted(attacks, key=json.dumps)
  return summary["defenses"], summary["references"], metrics, order


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  run = tmp_path_factory.mktemp("whole") / "run"
  assert execute(*RUN, f"--output_dir={run}") == 0
  return run


@pytest.mark.parametrize(
  "stop",
  [
    pytest.param(2, marks=pytest.mark.slow, id="first_training"),
    pytest.param(6, id="second_training"),
    pytest.param(9, marks=pytest.mark.slow, id="first_attack"),
    pytest.param(11, marks=pytest.mark.slow, id="second_attack"),
  ],
)
def test_an_interrupted_run_goes_on_to_the_same_end(
  stop, whole, tmp_path, monkeypatch
):
  run = tmp_path / "run"
  real, count = folder.append_line, 0

  def append_then_stop(path, value):
    nonlocal count
    real(path, value)
    count += 1
    if count == stop:
      raise KeyboardInterrupt

  monkeypatch.setattr(folder, "append_line", append_then_stop)
  assert execute(*RUN, f"--output_dir={run}") == 130
  monkeypatch.undo()
  # A line that was being written when the power went.
  with (run / "metrics.jsonl").open("a") as file:
    file.write('{"defense": "mix')
  assert execute(*RUN, f"--output_dir={run}", "--resume") == 0
  assert _ends(run) == _ends(whole)


def test_a_finished_run_resumes_to_itself(whole):
  before = _ends(whole)
  assert execute(*RUN, f"--output_dir={whole}", "--resume") == 0
  assert _ends(whole) == before


def test_another_config_is_refused_by_name(whole, capfd):
  status = execute(
    *RUN, f"--output_dir={whole}", "--resume", "--client_lr=0.7", "--seed=3"
  )
  assert status == 2
  err = capfd.readouterr().err
  assert "--client_lr was 0.1 and is 0.7" in err and "--seed" in err
  assert "--model" not in err and err.count("\n") == 1


def test_resume_with_nothing_there_begins(tmp_path):
  run = tmp_path / "run"
  status = execute(*SMALL, "--rounds=1", f"--output_dir={run}", "--resume")
  assert status == 0 and (run / "summary.json").is_file()


def test_overwrite_and_resume_contradict(tmp_path, capfd):
  run = tmp_path / "run"
  args = (f"--output_dir={run}", "--resume", "--overwrite")
  assert execute(*SMALL, *args) == 2
  assert "contradict" in capfd.readouterr().err


@pytest.mark.slow
def test_killed_at_twenty_random_moments(whole, tmp_path):
  """kill -9, again and again: the run goes on each time."""
  run = tmp_path / "run"
  command = [
    sys.executable,
    "-m",
    "experiments.main",
    *RUN,
    f"--output_dir={run}",
    "--resume",
  ]
  rng = random.Random(0)
  kills, begin, longest = 0, time.monotonic(), 4.0
  while True:
    process = subprocess.Popen(
      command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    if kills == 20:
      break
    try:
      _, err = process.communicate(timeout=rng.uniform(3.0, longest))
      assert process.returncode == 0, err.decode()
      # It finished before it was killed: begin anew, and wait less.
      longest = max(4.0, longest * 0.8)
      subprocess.run(["rm", "-r", str(run)], check=True)
    except subprocess.TimeoutExpired:
      os.kill(process.pid, signal.SIGKILL)
      process.wait()
      kills += 1
      longest += 1.0
    assert time.monotonic() - begin < 1200
  _, err = process.communicate(timeout=900)
  assert process.returncode == 0, err.decode()
  assert _ends(run) == _ends(whole)
