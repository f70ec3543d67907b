"""Several processes on one machine are one run, and stop together."""

import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from mpqfl_jax import distributed, errors
from tests.test_experiments import execute, lines

RUN = (
  "--model=mlp",
  "--num_clients=400",
  "--cohort_size=6",
  "--batch_size=4",
  "--size_sigma=1.5",
)
TRAIN = (
  *RUN,
  "--rounds=3",
  # Its clients have states, which every process needs.
  "--algorithm=scaffold",
  "--defense=int4",
  "--attack=dlg(iterations=1)",
  "--attack_clients=1",
  "--attack_rounds=2",
)


@pytest.fixture
def port():
  with socket.create_server(("", 0)) as server:
    return server.getsockname()[1]


@contextlib.contextmanager
def started(commands, env=None):
  """The processes, each with pipes; whatever is left of them is killed."""
  processes = [
    subprocess.Popen(
      [sys.executable, "-m", "experiments.main", *command],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      env={**os.environ, **(env[i] if env else {})},
    )
    for i, command in enumerate(commands)
  ]
  try:
    yield processes
  finally:
    for process in processes:
      process.kill()
      process.communicate()


def together(port, count, *args):
  return [
    (
      *args,
      f"--coordinator_address=localhost:{port}",
      f"--num_processes={count}",
      f"--process_id={i}",
    )
    for i in range(count)
  ]


# A line of gloo's for each device, printed piece by piece: those of two devices
# of one process may mix.
_GLOO = re.compile(
  r"\[Gloo\] Rank | is connected to | peer ranks\. "
  r"|Expected number of connected peer ranks is : |\d+|\n"
)


def ends(processes, timeout=300):
  """(status, stdout, stderr) of each."""
  found = []
  for process in processes:
    out, err = process.communicate(timeout=timeout)
    found.append((process.returncode, out, err))
  return found


def results(run: pathlib.Path):
  """What must not depend on who computes it: all but times."""
  summary = json.loads((run / "summary.json").read_text())
  metrics, attacks = (
    lines(run / f"{name}.jsonl") if (run / f"{name}.jsonl").exists() else []
    for name in ("metrics", "attacks")
  )
  for line in metrics + attacks:
    line.pop("seconds")
  for entry in summary["defenses"].values():
    entry.pop("seconds")
    entry.pop("compile_seconds")
  return summary["defenses"], summary["references"], metrics, attacks


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  """One process with four devices."""
  run = tmp_path_factory.mktemp("alone") / "run"
  command = (*TRAIN, "--devices=4", f"--output_dir={run}")
  with started([command]) as processes:
    ((status, _, err),) = ends(processes)
  assert status == 0, err
  return run


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_processes_give_the_bits_of_one(count, alone, tmp_path, port):
  run = tmp_path / "run"
  commands = together(
    port, count, *TRAIN, f"--devices={4 // count}", f"--output_dir={run}"
  )
  with started(commands) as processes:
    found = ends(processes)
  assert [status for status, *_ in found] == [0] * count, found
  assert results(run) == results(alone)
  # The others neither print nor write.
  assert "The report is" in found[0][1]
  assert [(_GLOO.sub("", out), err) for _, out, err in found[1:]] == [
    ("", "")
  ] * (count - 1)
  config = json.loads((run / "config.json").read_text())
  assert config["num_processes"] == count and config["mesh_devices"] == 4
  if count == 2:  # a finished run resumes to itself
    with started([(*c, "--resume") for c in commands]) as processes:
      found = ends(processes)
    assert [status for status, *_ in found] == [0] * count, found
    assert results(run) == results(alone)


LONG = (*RUN, "--rounds=60", "--checkpoint_every=5", "--eval_every=20")


@pytest.fixture(scope="module")
def long(tmp_path_factory):
  run = tmp_path_factory.mktemp("long") / "run"
  with started([(*LONG, "--devices=2", f"--output_dir={run}")]) as processes:
    ((status, _, err),) = ends(processes)
  assert status == 0, err
  return results(run)


@pytest.mark.slow
@pytest.mark.parametrize(
  "victim, how",
  [(1, signal.SIGKILL), (0, signal.SIGKILL), (0, signal.SIGSTOP)],
  ids=["killed", "main_killed", "main_frozen"],
)
def test_who_is_gone_stops_the_others_and_the_run_goes_on(
  victim, how, long, tmp_path, port
):
  run = tmp_path / "run"
  args = (*LONG, "--devices=1", f"--output_dir={run}")
  with started(together(port, 2, *args)) as processes:
    while not list((run / "checkpoints").glob("*/step_*5")):
      assert processes[0].poll() is None, processes[0].communicate()
      time.sleep(0.05)
    processes[victim].send_signal(how)
    begin = time.monotonic()
    other = processes[1 - victim]
    _, err = other.communicate(timeout=120)
    assert time.monotonic() - begin < 60
    assert other.returncode == distributed.STOPPED
  said = [line for line in err.splitlines() if line.startswith("error: ")]
  assert len(said) == 1 and err.endswith(said[0] + "\n")
  assert f"process {victim} of 2 is gone" in said[0]
  assert "--resume" in said[0] and str(run) in said[0]
  assert "Traceback" not in err
  done = len(lines_if_whole(run / "metrics.jsonl"))
  assert 5 <= done < 60
  if victim == 0:
    # One process with as many devices goes on, too.
    commands = [(*LONG, "--devices=2", f"--output_dir={run}", "--resume")]
  else:
    commands = together(port, 2, *args, "--resume")
  with started(commands) as processes:
    found = ends(processes)
  assert all(status == 0 for status, *_ in found), found
  assert results(run) == long


def lines_if_whole(path):
  return [text for text in path.read_text().splitlines() if text[-1:] == "}"]


@pytest.mark.slow
def test_other_flags_are_refused_everywhere(tmp_path, port):
  run = tmp_path / "run"
  commands = together(port, 2, *RUN, "--devices=1", f"--output_dir={run}")
  commands[1] += ("--client_lr=0.7",)
  with started(commands) as processes:
    found = ends(processes)
  for status, _, err in found:
    # A process may hear from the other before it has compared by itself.
    assert status in (2, distributed.STOPPED)
    assert "client_lr is 0.7 there and 0.1 in process 0" in err
    assert err.startswith("error: ") and err.count("\n") == 1
  assert not run.exists()


@pytest.mark.slow
def test_a_mistake_that_one_finds_stops_all(tmp_path, port):
  run = tmp_path / "run"
  run.mkdir()
  (run / "thesis.txt").write_text("mine")
  args = (*RUN, "--devices=1", f"--output_dir={run}")
  with started(together(port, 2, *args)) as processes:
    (zero, one) = ends(processes)
  assert zero[0] == 2 and zero[2].startswith(f"error: {run} holds files but")
  assert one[0] == distributed.STOPPED
  assert one[2].startswith("error: process 0 of 2 stopped: ")
  assert one[2].count("\n") == zero[2].count("\n") == 1


@pytest.mark.slow
def test_a_process_that_never_joins(tmp_path, port):
  run = tmp_path / "run"
  commands = together(port, 3, *RUN, "--join_seconds=3", f"--output_dir={run}")[
    :2
  ]
  begin = time.monotonic()
  with started(commands) as processes:
    found = ends(processes)
  assert time.monotonic() - begin < 60
  for status, _, err in found:
    assert status == 2 and err.count("\n") == 1
    assert "all 3 processes did not join" in err or "nothing answered" in err


@pytest.mark.slow
def test_jax_finds_the_others_where_a_launcher_says(tmp_path):
  """Open MPI's variables, as `mpirun` sets them."""
  run = tmp_path / "run"
  command = (
    *RUN,
    "--rounds=1",
    "--devices=1",
    f"--output_dir={run}",
    "--coordinator_address=auto",
  )
  # JAX takes the port from the number of the job.
  env = [
    {
      "OMPI_MCA_orte_hnp_uri": f"{os.getpid() << 16}.0;tcp://127.0.0.1:1",
      "OMPI_COMM_WORLD_SIZE": "2",
      "OMPI_COMM_WORLD_RANK": str(i),
      "OMPI_COMM_WORLD_LOCAL_RANK": str(i),
    }
    for i in range(2)
  ]
  with started([command] * 2, env) as processes:
    found = ends(processes)
  assert [status for status, *_ in found] == [0, 0], found
  config = json.loads((run / "config.json").read_text())
  assert config["mesh_devices"] == 2


@pytest.mark.parametrize(
  "args, words",
  [
    (["--num_processes=2"], "--coordinator_address, --process_id is missing"),
    (["--coordinator_address=here:1"], "--num_processes, --process_id is"),
    (
      [
        "--coordinator_address=here:1",
        "--num_processes=2",
        "--process_id=2",
      ],
      "--process_id=2 with --num_processes=2. Expected 0 to 1",
    ),
    (
      ["--coordinator_address=here", "--num_processes=2", "--process_id=1"],
      "Expected host:port",
    ),
    (["--coordinator_address=auto", "--process_id=1"], "by itself"),
    (
      ["--coordinator_address=auto", "--task=attack", "--attack=dlg"],
      "one process",
    ),
  ],
)
def test_impossible_flags(args, words, tmp_path, capfd):
  run = tmp_path / "run"
  assert execute(*RUN, f"--output_dir={run}", *args) == 2
  err = capfd.readouterr().err
  assert words in err and err.startswith("error: ") and err.count("\n") == 1
  assert not run.exists()


@pytest.mark.parametrize(
  "host, process_id, words",
  [
    ("localhost", 1, "nothing answered at"),
    ("no.such.host.invalid", 1, "no such host"),
    ("no.such.host.invalid", 0, "no such host"),
  ],
)
def test_a_wrong_address(host, process_id, words, port):
  begin = time.monotonic()
  with pytest.raises(errors.UserError, match=words):
    distributed.join(f"{host}:{port}", 2, process_id, 1, "")
  assert time.monotonic() - begin < 30


def test_a_port_that_is_taken():
  with (
    socket.create_server(("", 0)) as server,
    pytest.raises(errors.UserError, match="cannot listen"),
  ):
    address = f"localhost:{server.getsockname()[1]}"
    distributed.join(address, 2, 0, 1, "")
