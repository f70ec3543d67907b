"""Published results, repeated in a shortened form."""

import json

import pytest

from experiments import config
from tests.test_experiments import execute


@pytest.mark.slow
def test_fedavg_on_mnist_as_published(tfds_dir, tmp_path):
  """McMahan et al. 2017, table 2: 99% after 20 rounds at E=5, B=10, C=0.1.

  Three rounds instead of thirty, with two local epochs instead of five: the
  curve must already be where the full run is at its beginning.
  """
  run = tmp_path / "run"
  status = execute(
    f"--flagfile={config.FLAGS_DIR / 'fedavg_mnist_cnn.flags'}",
    f"--data_dir={tfds_dir}",
    f"--output_dir={run}",
    "--rounds=3",
    "--local_epochs=2",
    "--devices=2",
  )
  assert status == 0
  lines = (run / "metrics.jsonl").read_text().splitlines()
  accuracy = [json.loads(line)["test_accuracy"] for line in lines]
  assert accuracy[-1] > 0.95
