"""`list` and `--dry_run`: the command line explains itself."""

import re

import pytest

from experiments import catalogue, config, dry_run, setting
from mpqfl_jax import (
  accounting,
  attacks,
  datasets,
  defenses,
  errors,
  models,
  precision,
)
from tests.test_experiments import SMALL, execute


def test_everything_is_listed_with_its_parameters():
  text = catalogue.text([])
  for table in (
    datasets.SAMPLES,
    datasets.FULL_SETS,
    models.MODELS,
    precision.CODECS,
    defenses.TRANSFORMING,
    attacks.ATTACKS,
  ):
    for name in table:
      assert re.search(rf"^  {name} +\S", text, re.MULTILINE), name
  assert "clip=1.0, noise_multiplier=None, epsilon=None" in text
  assert "auxiliary=" not in text and "leakage=" not in text


def test_one_table_by_its_heading():
  assert catalogue.text(["attacks"]).startswith("Attacks (--attack)\n  dlg ")
  assert "lenet_zhu" not in catalogue.text(["attacks"])
  assert "lenet_zhu" in catalogue.text(["attacks", "models"])


def test_entries_by_a_part_of_their_names():
  text = catalogue.text(["dp"])
  names = re.findall(r"^  (\w+) ", text, re.MULTILINE)
  assert names == [n for n in defenses.TRANSFORMING if n.startswith("dp_")]
  assert text.startswith("Other defences (--defense)\n")
  both = catalogue.text(["int4", "models"])
  assert "lenet_zhu" in both and "  int4 " in both and "  int8 " not in both
  with pytest.raises(errors.UserError, match=r"Expected a table .*such as dp"):
    catalogue.text(["foo"])
  with pytest.raises(errors.UserError, match="Did you mean 'dp_gaussian'"):
    catalogue.text(["dp_gausian"])


def test_the_command(capfd):
  assert execute("list", "models") == 0
  assert capfd.readouterr().out.startswith("Models (--model)\n")
  assert execute("list", "atacks") == 2
  assert "Did you mean 'attacks'?" in capfd.readouterr().err


@pytest.mark.parametrize("task", ["train", "attack"])
def test_a_dry_run_measures_and_writes_nothing(tmp_path, capfd, task):
  run = tmp_path / "run"
  images = ("--attack_images=test:0-3",) if task == "attack" else ()
  status = execute(
    *SMALL,
    f"--task={task}",
    "--rounds=40",
    "--defense=none,int4",
    "--attack=dlg(iterations=2)",
    f"--output_dir={run}",
    "--dry_run",
    *images,
  )
  said = capfd.readouterr()
  assert status == 0, said.err
  assert not run.exists()
  assert "--rounds=40" in said.out and "--defense=none,int4" in said.out
  assert "What a client sends under int4:" in said.out
  assert re.search(r"message +\d", said.out)
  counted = re.search(r"^Costs of attacks on (\d+) updates of", said.out, re.M)
  # One update of four images, or those of two clients; under either defence.
  assert counted and int(counted[1]) == (2 if task == "attack" else 4)
  attack = re.search(r"^dlg\S* +[\d.]+ +([\d.]+) +2 +(\d+)$", said.out, re.M)
  assert attack and float(attack[1]) > 0
  assert said.out.endswith("Nothing was written.\n")
  costs = re.findall(r"^(none|int4) +[\d.]+ +([\d.]+) +(\d+) ", said.out, re.M)
  if task == "attack":
    assert not costs
    return
  assert [name for name, *_ in costs] == ["none", "int4"]
  for _, one, whole in costs:
    assert float(whole) >= 40 * float(one) - 1
  assert "Peak memory of the process" in said.out


def test_a_dry_run_says_what_noise_an_epsilon_takes():
  values = config.make(
    model="mlp",
    num_clients=50,
    cohort_size=5,
    rounds=3,
    defense="dp_gaussian(clip=2,epsilon=8),dp_sgd(noise_multiplier=3),int4",
  )
  built = setting.build(values)
  gaussian, sgd, quantiser = (
    " ".join(dry_run._noise(values, built, d)) for d in built.defenses
  )
  stddev = built.defenses[0].noise_stddev
  assert f"norm of 2; noise of deviation {stddev:.3g} on each entry" in gaussian
  most = accounting.most_releases(built.protocol.ledger)
  assert "Epsilon 8 at delta 1e-05" in gaussian
  assert f"for the client that sends most: {most} times" in gaussian
  assert "3 times as much noise on each example's gradient" in sgd
  assert "about one example" in sgd
  assert quantiser == ""
  assert "50 of 120 to 120 examples" in dry_run._population(built)


def test_a_dry_run_refuses_what_consists_of_runs(capfd):
  assert execute("--task=scaling", "--num_clients=1000", "--dry_run") == 2
  assert "--dry_run with --task=scaling" in capfd.readouterr().err
