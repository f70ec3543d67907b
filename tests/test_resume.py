"""A run that dies goes on and ends as one that did not."""

import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

from absl import flags
from absl.testing import flagsaver
import pytest

from experiments import config, folder, setting
from mpqfl_jax import client_state, errors, trees
from tests.test_experiments import SMALL, execute, from_args, lines

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


# Clients that carry a control variate, residuals and a range from round to
# round; checkpoints between which clients come twice.
STATES = (
  *SMALL,
  "--rounds=7",
  "--checkpoint_every=2",
  "--num_clients=30",
  "--cohort_size=12",
  "--dropout=0.2",
  "--algorithm=scaffold",
  "--defense=int4(error_feedback=True,range=static)",
  "--client_lr_schedule=cosine(warmup=2)",
)


def _ends(run: pathlib.Path):
  """What must not depend on where a run was cut: all but times."""
  summary = json.loads((run / "summary.json").read_text())
  metrics = lines(run / "metrics.jsonl")
  attacked = run / "attacks.jsonl"
  attacks = lines(attacked) if attacked.exists() else []
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


def test_resume_and_the_folder_are_enough(whole, capfd):
  before = _ends(whole)
  assert execute("--resume", f"--output_dir={whole}") == 0
  assert _ends(whole) == before
  # What is given has to be as it was; only that is named.
  args = ("--resume", f"--output_dir={whole}", "--attack_rounds=2")
  assert execute(*args, "--model=mlp") == 2
  err = capfd.readouterr().err
  assert "--attack_rounds was 1,3 and is 2." in err and "--model" not in err
  assert "_resolved" not in err


def test_what_is_not_given_is_that_of_the_run(whole):
  args = ("--resume", f"--output_dir={whole}")
  values = from_args(*args)
  stored = json.loads((whole / "config.json").read_text())
  for name, value in dataclasses.asdict(values).items():
    kept = list(value) if isinstance(value, tuple) else value
    if name not in ("resume", "output_dir"):
      assert kept == stored[name], name
  assert values.defense == ("int4", "dp_gaussian") and values.devices == 2
  assert config.make(resume=True, output_dir=str(whole)) == values
  # Where processes share the devices, each start says how.
  together = ("--coordinator_address=host:1", "--num_processes=2")
  assert from_args(*args, *together, "--process_id=0").devices is None
  with flagsaver.flagsaver():
    flags.FLAGS(["main", *args])
    assert config.cpu_devices(flags.FLAGS) == 2


def test_a_run_made_over_another_does_not_go_on_over_itself(tmp_path):
  values = {"output_dir": str(tmp_path / "run"), "overwrite": True}
  folder.create(
    values["output_dir"], dataclasses.asdict(config.make(**values)), True
  )
  again = config.make(output_dir=values["output_dir"], resume=True)
  assert again.resume and not again.overwrite


def test_a_slip_in_the_folders_name_begins_no_run(tmp_path, capfd):
  run = tmp_path / "rnu"
  assert execute("--resume", f"--output_dir={run}") == 2
  assert "no run in" in capfd.readouterr().err and not run.exists()


@pytest.mark.parametrize(
  "name, old, new, words",
  [
    ("mesh_devices", 2, 1, "made on 2 devices, and this would go on with 1"),
    ("mesh_devices", 1, 2, "made on 1 device, and"),
    (
      "plan_resolved",
      {"name": "loop", "size": 1, "reason": "cpu: slow"},
      {"name": "vmap", "size": 0, "reason": "gpu: wide"},
      "its plan is loop (cpu: slow), and here it would be vmap (gpu: wide)",
    ),
    (
      "matmul_precision",
      "tensorfloat32",
      "float32",
      "made in tensorfloat32 precision, and would be made in float32",
    ),
    ("parameters", 1000, 2000, "had 1,000 parameters and has 2,000 now"),
    ("client_state_resolved", {"a": {}}, {"b": {}}, "states of clients"),
    ("parameters", None, 2000, "of an older version"),
  ],
)
def test_what_no_flag_gives_is_said_in_words(name, old, new, words, tmp_path):
  begun = {"task": "train", "seed": 0} | ({} if old is None else {name: old})
  place = str(tmp_path / "run")
  folder.create(place, begun)
  with pytest.raises(errors.UserError) as caught:
    folder.create(place, begun | {name: new}, resume=True)
  said = str(caught.value)
  assert words in said and "another --output_dir" in said
  assert "{" not in said and "_resolved" not in said
  # A flag that differs is what to mend first.
  with pytest.raises(errors.UserError, match=r"--seed was 0 and is 1\. Leave"):
    folder.create(place, begun | {name: new, "seed": 1}, resume=True)


def test_resume_with_nothing_there_begins(tmp_path):
  run = tmp_path / "run"
  status = execute(*SMALL, "--rounds=1", f"--output_dir={run}", "--resume")
  assert status == 0 and (run / "summary.json").is_file()


def test_overwrite_and_resume_contradict(tmp_path, capfd):
  run = tmp_path / "run"
  args = (f"--output_dir={run}", "--resume", "--overwrite")
  assert execute(*SMALL, *args) == 2
  assert "contradict" in capfd.readouterr().err


@pytest.fixture(scope="module")
def with_states(tmp_path_factory):
  run = tmp_path_factory.mktemp("states") / "run"
  args = (f"--output_dir={run}", "--client_state=device")
  assert execute(*STATES, *args) == 0
  return run


@pytest.mark.parametrize(
  "where", ["disk", pytest.param("host", marks=pytest.mark.slow)]
)
def test_states_off_the_device_resume_to_the_same_bits(
  where, with_states, tmp_path, monkeypatch
):
  run = tmp_path / "run"
  args = (*STATES, f"--output_dir={run}", f"--client_state={where}")
  real = folder.append_line
  # A round after a checkpoint, and right at one.
  for stop in (3, 6):

    def append_then_stop(path, value, stop=stop):
      real(path, value)
      if value["round"] == stop:
        raise KeyboardInterrupt

    monkeypatch.setattr(folder, "append_line", append_then_stop)
    assert execute(*args, "--resume") == 130
  monkeypatch.undo()
  rows = list((run / "client_states").glob("*")) if where == "disk" else [1]
  assert len(rows) == 1
  assert execute(*args, "--resume") == 0
  assert _ends(run) == _ends(with_states)
  if where == "disk":
    assert list((run / "client_states").glob("*")) == []
    largest = max(
      sum(file.stat().st_size for file in step.rglob("*") if file.is_file())
      for step in (run / "checkpoints").glob("*/step_*")
    )
    # Two models in float32, Adam-free, and a few bytes a client.
    parameters = json.loads((run / "config.json").read_text())["parameters"]
    assert largest < 2.5 * 4 * parameters
  resolved = json.loads((run / "config.json").read_text())
  (place,) = resolved["client_state_resolved"].values()
  assert place["name"] == where and place["num_bytes"] > 0


@pytest.mark.slow
def test_blocks_of_clients_make_the_same_round(tmp_path, monkeypatch):
  """Five clients at a time, twelve in a round, wherever their states are."""
  # A client's state is its control variate: a model in float32.
  row = 4 * trees.size(setting.build(config.make(model="mlp")).template)

  def run(name, where, block):
    monkeypatch.setattr(client_state, "BLOCK_BYTES", block * row)
    place = tmp_path / name
    args = (
      f"--output_dir={place}",
      f"--client_state={where}",
      "--devices=1",
      "--rounds=4",
      "--local_steps=1",
      "--defense=none",
      "--attack=dlg(iterations=2)",
      "--attack_rounds=3",
    )
    assert execute(*STATES, *args) == 0
    resolved = json.loads((place / "config.json").read_text())
    assert resolved["client_state_resolved"]["none"]["block"] == block
    return _ends(place)

  device, disk = run("device", "device", 5), run("disk", "disk", 5)
  assert device == disk
  # The programs differ, and so may the last bit.
  whole = run("whole", "device", 12)
  assert len(whole[3]) > 0
  for part in (2, 3):
    for mine, other in zip(whole[part], device[part], strict=True):
      numbers = {k for k, v in mine.items() if isinstance(v, float)}
      assert {k: v for k, v in other.items() if k not in numbers} == {
        k: v for k, v in mine.items() if k not in numbers
      }
      for key in numbers:
        assert other[key] == pytest.approx(mine[key], rel=1e-3, abs=1e-5), key


@pytest.mark.slow
@pytest.mark.parametrize("kind, wanted", [("attacked", 20), ("states", 8)])
def test_killed_at_random_moments(kind, wanted, whole, with_states, tmp_path):
  """kill -9, again and again: the run goes on each time."""
  run = tmp_path / "run"
  args, end = {
    "attacked": (RUN, whole),
    "states": ((*STATES, "--client_state=disk"), with_states),
  }[kind]
  command = [
    sys.executable,
    "-m",
    "experiments.main",
    *args,
    f"--output_dir={run}",
    "--resume",
  ]
  rng = random.Random(0)
  kills, begin, longest = 0, time.monotonic(), 4.0
  while True:
    process = subprocess.Popen(
      command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    if kills == wanted:
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
  assert _ends(run) == _ends(end)


def test_another_reason_for_the_same_plan_is_no_other_plan(tmp_path):
  def config(reason):
    plan = {"name": "chunk", "size": 100, "reason": reason}
    return {"task": "train", "seed": 0, "plan_resolved": plan}

  place = str(tmp_path / "run")
  folder.create(place, config("room for 400"))
  folder.create(place, config("room for 512"), resume=True)
