"""The benchmark of accelerators measures what it says, on any device."""

import jax
import numpy as np
import pytest

from benchmarks import accelerator, page
from mpqfl_jax import attacks, models
from mpqfl_jax.types import Observation


def _rows(section, rows, tmp_path):
  into = []
  path = tmp_path / "rows.json"
  accelerator.measured(section, rows, into, str(path))
  assert path.read_text().count("device") == len(into)
  return into


def test_training_does_the_work_and_tells_its_memory(tmp_path):
  cases = [
    accelerator.Training("mlp", 4, size, "slices", "float32") for size in (1, 4)
  ]
  found = _rows("training", accelerator.training(cases, 1, 60.0), tmp_path)
  assert [row["size"] for row in found] == [1, 4]
  for row in found:
    assert row["update_error"] < 1e-4
    assert row["client_updates_per_second"] == 4 / row["seconds_per_round"]
  # Four clients' weights instead of one's.
  weights = 4 * 199_210
  grown = found[1]["temporary_bytes"] - found[0]["temporary_bytes"]
  assert grown > 3 * weights
  assert "| `mlp`, 4 | 4 | slices | float32 |" in accelerator.markdown(found)


def test_a_case_that_fails_is_a_row(tmp_path):
  cases = [accelerator.Training("mlp", 2, 2, "no_such_form", "float32")]
  (row,) = _rows("training", accelerator.training(cases, 1, 60.0), tmp_path)
  assert "no_such_form" in row["failed"]
  assert accelerator.markdown([row])


def test_searches_find_images_and_stay_below_the_formula(tmp_path):
  spec = "dlg(iterations=20,history=10)"
  cases = [
    accelerator.Search("mlp", spec, lanes, "slices", "float32")
    for lanes in (1, 4)
  ]
  found = _rows(
    "attacks", accelerator.searches(cases, "mnist_sample", 0), tmp_path
  )
  for row in found:
    assert row["steps"] == 20
    assert row["psnr_db_median"] > 10
    used = row["argument_bytes"] + row["temporary_bytes"]
    assert used / row["lanes"] < row["lane_bytes"]


def test_the_formula_counts_the_history():
  model = models.make("mlp", (4, 4, 1), 3, np.zeros(1), np.ones(1))
  params = model.init(jax.random.key(0))
  observation = Observation(params, params, None, None, np.float32(1))

  def size(history):
    attack = attacks.make("dlg", model, history=history)
    return accelerator.lane_bytes(attack, observation, 0)

  # Two copies of 16 pixels and 3 soft labels, of steps and differences, and of
  # two square matrices.
  added = 2 * (2 * 19 * (20 - 10) + 2 * (20**2 - 10**2))
  assert size(20) - size(10) == 4 * added


def test_codecs_are_measured_beside_a_copy(tmp_path):
  rows = accelerator.codecs("int8,topk(ratio=0.1)", 10_000, calls=2)
  copy, int8, topk = _rows("codecs", rows, tmp_path)
  assert copy["codec"] == "copy" and copy["gb_s"] > 0
  assert int8["bytes"] == 10_005
  assert topk["bytes"] < int8["bytes"]
  for row in (int8, topk):
    share = row["encode_gb_s"] / copy["gb_s"]
    assert row["encode_of_copy"] == pytest.approx(share)


def test_tables_are_put_into_their_blocks(tmp_path):
  rows = [
    {
      "section": "codecs",
      "device": "a device",
      "jax": "1",
      "xla_flags": "",
      "codec": "copy",
      "gb_s": 1234.0,
    }
  ]
  path = tmp_path / "page.md"
  name = "accelerator codecs"
  path.write_text(f"<!-- {name}: begin -->\n<!-- {name}: end -->\n")
  accelerator._put(rows, path)
  assert "| `copy` | 1,234 | 1,234 |" in path.read_text()
  assert "a device, jax 1, XLA's flags `none`." in path.read_text()
  with pytest.raises(ValueError, match="expected one"):
    page.put(path, "accelerator training", "")
