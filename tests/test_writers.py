"""Metrics outside of `metrics.jsonl`: the same numbers, no round twice."""

import json
import struct
import sys
import types

import pytest

from experiments import config, main, writers
from mpqfl_jax import errors

SMALL = {"num_clients": 20, "cohort_size": 4, "rounds": 3, "defense": ("int8",)}


def events(folder):
  """(tag, step) -> value, and steps that a later file declared void."""
  from tensorboardX.proto import event_pb2

  found, steps = {}, []
  for path in sorted(folder.glob("events*")):
    data, place = path.read_bytes(), 0
    while place < len(data):
      (length,) = struct.unpack_from("<Q", data, place)
      event = event_pb2.Event.FromString(data[place + 12 : place + 12 + length])
      place += 16 + length
      if event.HasField("session_log"):
        found = {k: v for k, v in found.items() if k[1] < event.step}
      for value in event.summary.value:
        found[value.tag, event.step] = value.simple_value
        steps.append(event.step)
  return found


def test_tensorboard_has_what_the_lines_have(tmp_path):
  pytest.importorskip("tensorboardX")
  run = main.run(
    config.make(
      output_dir=str(tmp_path / "run"), writers=("tensorboard",), **SMALL
    )
  )
  found = events(run / "tensorboard" / "int8")
  lines = (run / "metrics.jsonl").read_text().splitlines()
  assert len(lines) == 3
  for line in map(json.loads, lines):
    for name in ("train_loss", "test_accuracy", "uplink_bytes", "seconds"):
      got = found[name, line["round"]]
      assert got == pytest.approx(line[name], rel=1e-6)
    assert ("epsilon", line["round"]) not in found  # None has no place


def test_rounds_that_are_run_again_are_not_shown_twice(tmp_path):
  pytest.importorskip("tensorboardX")
  values = config.make(writers=("tensorboard",), **SMALL)
  for done, shown in ((0, 0.25), (1, 0.5)):
    (writer,) = writers.make(values, "int8", tmp_path, done)
    for step in range(done + 1, 4 - done):
      writer.write({"defense": "int8", "round": step, "test_accuracy": shown})
    writer.close()
  found = events(tmp_path / "tensorboard" / "int8")
  assert found == {
    ("test_accuracy", 1): 0.25,
    ("test_accuracy", 2): 0.5,
  }


def test_wandb_gets_a_run_a_defence(tmp_path, monkeypatch):
  said = []

  class Run:
    def log(self, values, step):
      said.append((step, values))

    def finish(self):
      said.append("finished")

  def init(**given):
    said.append((given["group"], given["name"], given["config"]["rounds"]))
    return Run()

  monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
  values = config.make(writers=("wandb",), **SMALL)
  (writer,) = writers.make(values, "int8", tmp_path / "run", 0)
  costs = {"encryption": {"seconds": 2.0}}
  writer.write(
    {"defense": "int8", "round": 1, "epsilon": None, "a": 1, **costs}
  )
  writer.close()
  assert said == [
    ("run", "int8", 3),
    (1, {"a": 1, "encryption/seconds": 2.0}),
    "finished",
  ]


@pytest.mark.parametrize(
  "name, words",
  [("tensorbord", "tensorboard"), ("wandb", "pip install wandb")],
)
def test_a_writer_that_is_not_there(name, words, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)
  values = config.make(
    output_dir=str(tmp_path / "run"), writers=(name,), **SMALL
  )
  with pytest.raises(errors.UserError, match=words):
    main.run(values)
  assert not (tmp_path / "run").exists()
