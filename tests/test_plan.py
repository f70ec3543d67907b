"""The plan on paper: its arithmetic, and that the page holds its tables."""

import pathlib

import pytest

from benchmarks import page, plan

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "scaling.md"


def test_the_work_is_the_papers_cnn():
  work = plan.work("cnn")
  assert work.parameters == 1_663_370  # McMahan et al. 2017, section 3
  # Products by hand; the first layer has no gradient to hand on.
  first, second = 28 * 28 * 25 * 32, 14 * 14 * 25 * 32 * 64
  dense = 7 * 7 * 64 * 512 + 512 * 10
  assert work.flops == 2 * 64 * (2 * first + 3 * second + 3 * dense)


def test_cost_by_hand():
  device = plan.Accelerator("it", flops=1e12, link=1e3, source="")
  cost = plan.cost(plan.Work(1000, 1e9), 200, device, 4, 0.5)
  assert cost.compute == pytest.approx(200e9 / (4 * 0.5e12))
  assert cost.sum == pytest.approx(2 * 0.75 * 4000 / 1e3)
  assert cost.report == pytest.approx(0.75 * 14 * 200 / 1e3)


def test_the_page_holds_the_plan(tmp_path):
  copy = tmp_path / "page.md"
  copy.write_text(PAGE.read_text())
  page.put(copy, "plan", plan.plan_table())
  assert copy.read_text() == PAGE.read_text()


def test_measured_rows_are_ours_alone():
  row = {
    "system": "mpqfl_jax",
    "model": "cnn",
    "clients": 1000,
    "plan": "loop",
    "client_updates_per_second": 100.0,
    "gflops": 50.0,
    "matmul_peak_gflops": 200.0,
    "cpu": "a processor",
    "cores": 2,
  }
  table = plan.measured_table([row, {**row, "system": "pfl"}])
  assert table.startswith("On a processor, 2 cores:\n")
  (line,) = table.splitlines()[4:]
  assert line == "| cnn | 1,000 | loop | 100.0 | 25% | 167 |"


def test_a_block_of_a_page_is_replaced(tmp_path):
  path = tmp_path / "page.md"
  path.write_text("a\n<!-- x: begin -->\nold\n<!-- x: end -->\nb\n")
  page.put(path, "x", "new\n")
  want = "a\n<!-- x: begin -->\n\nnew\n\n<!-- x: end -->\nb\n"
  assert path.read_text() == want


def test_a_page_without_the_marks(tmp_path):
  path = tmp_path / "page.md"
  path.write_text("nothing")
  with pytest.raises(ValueError, match="plan: begin"):
    page.put(path, "plan", "text")
