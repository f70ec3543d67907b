"""The task `scaling`, its table, figure and page, and large populations."""

import json

import numpy as np
import pytest

from experiments import costs, scaling, setting
from mpqfl_jax import errors
from mpqfl_jax.report import html
from mpqfl_jax.report import scaling as report
from tests import browser
from tests.test_experiments import execute, from_args, lines

SMALL = (
  "--task=scaling",
  "--scaling_clients=4,16",
  "--model=mlp",
  "--num_clients=60",
  "--client_examples=3",
  "--batch_size=3",
  "--rounds=3",
  "--devices=2",
  "--defense=none,int8(rounding=stochastic)",
)


def _line(clients, seconds, **values):
  return {
    "defense": "none",
    "clients": clients,
    "num_clients": 1000,
    "seconds_per_round": seconds,
    "client_updates_per_second": clients / seconds,
    "uplink_bytes": 100.0 * clients,
    "downlink_bytes": 100.0 * clients,
    "peak_rss_mb": 500.0,
    "peak_device_mb": None,
    "compile_seconds": 1.0,
    "rounds": 3,
    "test_accuracy": 0.5,
    "plan": {"name": "loop", "size": 1, "conv": "xla", "reason": "asked for"},
    "devices": 2,
    **values,
  }


@pytest.mark.slow
def test_a_scaling_run_measures_each_cohort_alone(tmp_path, capsys):
  run = tmp_path / "run"
  assert execute(*SMALL, f"--output_dir={run}") == 0
  found = lines(run / "scaling.jsonl")
  summary = json.loads((run / "summary.json").read_text())
  assert summary["task"] == "scaling" and summary["scaling"] == found
  assert [(line["clients"], line["defense"]) for line in found] == [
    (clients, defense)
    for clients in (4, 16)
    for defense in ("none", "int8(rounding=stochastic)")
  ]
  for line in found:
    assert set(line) == set(_line(1, 1.0))
    assert line["peak_rss_mb"] > 100 and line["seconds_per_round"] > 0
    rate = line["clients"] / line["seconds_per_round"]
    np.testing.assert_allclose(line["client_updates_per_second"], rate)
  per_client = {line["uplink_bytes"] / line["clients"] for line in found[::2]}
  assert per_client == {summary["uplink_bytes_per_client_float32"]}
  assert "| none | 16 |" in capsys.readouterr().out
  page = (run / "report.html").read_text()
  assert "Cost against clients" in page and "data:image/png" in page
  assert (run / "figures" / "scaling.png").stat().st_size > 10_000
  browser.check(run / "report.html", tmp_path)
  # What is finished is not measured again.
  before = (run / "cohorts" / "none_16" / "summary.json").stat().st_mtime_ns
  assert execute(*SMALL, f"--output_dir={run}", "--resume") == 0
  after = (run / "cohorts" / "none_16" / "summary.json").stat().st_mtime_ns
  assert before == after and lines(run / "scaling.jsonl") == found


def test_the_command_line_of_a_run_gives_its_config(tmp_path):
  values = from_args(*SMALL, "--local_steps=2")
  child = from_args(*scaling.arguments(values, "int8", 16, tmp_path))
  assert child.task == "train" and child.cohort_size == 16
  assert child.defense == ("int8",) and child.attack == ()
  assert child.output_dir == str(tmp_path) and child.resume
  for name in (
    "model",
    "num_clients",
    "client_examples",
    "local_steps",
    "seed",
  ):
    assert getattr(child, name) == getattr(values, name)


def test_a_run_that_fails_is_named(tmp_path):
  values = from_args(*SMALL, "--dataset=mnist", "--data_dir=no/such/folder")
  with pytest.raises(errors.UserError, match=r"4 clients.*no/such/folder"):
    scaling._measure(values, "none", 4, tmp_path / "child")


@pytest.mark.parametrize(
  "args, words",
  [
    (["--scaling_clients=4,61"], "61"),
    (["--scaling_clients=0"], "0"),
    (["--scaling_clients=few"], "whole numbers"),
    (["--attack=dlg"], "attacks nothing"),
  ],
)
def test_mistakes(args, words, tmp_path, capfd):
  assert execute(*SMALL, *args, f"--output_dir={tmp_path / 'run'}") == 2
  assert words in capfd.readouterr().err
  assert not (tmp_path / "run").exists()


def test_the_page_says_how_cost_grows(tmp_path):
  found = [_line(10, 0.1), _line(1000, 11.0, peak_rss_mb=550.0)]
  (said,) = report.sentences(found)
  assert "10 to 1,000" in said and "1.10 times the time" in said
  assert "1.10 times the memory" in said
  assert list(report.sentences(found[:1])) == []
  table = report.markdown(found)
  assert "| none | 1,000 | 11.0 | 90.9 | 100,000 | 550 | 50.0% |" in table
  (tmp_path / "summary.json").write_text(json.dumps({"task": "train"}))
  (tmp_path / "config.json").write_text("{}")
  with pytest.raises(errors.UserError, match="no figures"):
    report.write(tmp_path)
  with pytest.raises(errors.UserError, match="names no defenses"):
    html.write(tmp_path)


def test_keys_for_encryption_have_a_panel(tmp_path):
  rows = [
    {
      "scheme": scheme,
      "source": "measured" if clients < 100 else "modelled",
      "clients": clients,
      "key_seconds_total": seconds * clients**power,
    }
    for scheme, seconds, power in (("shared", 0.01, 0), ("per_client", 0.01, 1))
    for clients in (2, 50, 1000)
  ]
  drawn = report.draw([_line(10, 0.1), _line(1000, 11.0)], rows)
  keys = drawn.axes[-1]
  assert "Making keys" in keys.get_title(loc="left")
  assert len(keys.lines) == 4 and keys.lines[3].get_linestyle() == "--"
  accuracy = drawn.axes[4]
  assert list(accuracy.lines[0].get_ydata()) == [0.5, 0.5]
  without = report.draw([_line(10, 0.1), _line(1000, 11.0)])
  assert not without.axes[-1].axison
  broken = tmp_path / "costs.json"
  broken.write_text('[{"scheme": "shared"}]')
  with pytest.raises(errors.UserError, match="study_encryption"):
    costs.encryption(str(broken))


def test_a_million_clients_are_only_indices():
  """Populations larger than the training set, described and sampled."""
  values = from_args(
    "--model=mlp",
    "--num_clients=1000000",
    "--cohort_size=10000",
    "--rounds=2",
    "--partition=iid",
  )
  built = setting.build(values)
  assert built.clients.num_clients == 1_000_000
  assert set(built.clients.sizes) == {1}
  held = (built.clients.order.nbytes + built.clients.offsets.nbytes) / 1e6
  assert held <= 16
  cohort = setting.sample(values, built.clients, 2)
  assert len(set(cohort.client_id.tolist())) == 10_000
  assert cohort.client_id.max() > 900_000
  rows = built.clients.order[cohort.offset]
  assert rows.max() < len(built.data.y_train) < 1_000_000
