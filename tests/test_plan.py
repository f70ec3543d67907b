"""The plan on paper: its arithmetic, and that the page holds its tables."""

import pathlib

import numpy as np
import pytest

from benchmarks import plan

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "scaling.md"


def test_operations_equal_a_count_by_hand():
  """The FedAvg CNN: products that no padding takes part in, two or three times.

  A row of `n` pixels under 5 taps with padding 2 meets 5 n - 6 pixels. The
  images need no gradient.
  """
  first = (5 * 28 - 6) ** 2 * 1 * 32 * 2
  second = (5 * 14 - 6) ** 2 * 32 * 64 * 3
  dense = (7 * 7 * 64 * 512 + 512 * 10) * 3
  work = plan.work("cnn")
  assert work.parameters == 1_663_370
  # The rest is biases, pooling and the softmax: below 2%.
  np.testing.assert_allclose(
    work.flops, 2 * 64 * (first + second + dense), rtol=0.02
  )


def test_cost_by_hand():
  device = plan.Accelerator("it", flops=1e12, link=1e3, source="")
  cost = plan.cost(plan.Work(1000, 1e9), 200, device, 4, 0.5)
  assert cost.compute == pytest.approx(200e9 / (4 * 0.5e12))
  assert cost.sum == pytest.approx(2 * 0.75 * 4000 / 1e3)
  assert cost.report == pytest.approx(0.75 * 14 * 200 / 1e3)


def test_the_page_holds_the_plan():
  page = PAGE.read_text()
  assert plan.put_in(page, "plan", plan.plan_table()) == page


def test_measured_rows_are_ours_alone():
  row = {
    "system": "mpqfl_jax",
    "model": "cnn",
    "clients": 1000,
    "plan": "loop",
    "client_updates_per_second": 100.0,
    "gflops": 50.0,
    "matmul_peak_gflops": 200.0,
  }
  table = plan.measured_table([row, {**row, "system": "pfl"}])
  (line,) = table.splitlines()[2:]
  assert line == "| cnn | 1,000 | loop | 100.0 | 25% | 167 |"


def test_a_page_without_the_marks():
  with pytest.raises(ValueError, match="plan: begin"):
    plan.put_in("nothing", "plan", "text")
