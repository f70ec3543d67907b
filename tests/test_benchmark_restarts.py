"""The benchmark of restarts measures what it says."""

import jax
import numpy as np
import pytest

from benchmarks import restarts
from mpqfl_jax import errors


def test_rows_are_of_all_restarts_and_widths():
  rows = restarts.measure(
    "mlp:inverting_gradients(iterations=20)",
    "mnist_sample",
    3,
    [1, 3],
    [1, 3],
    1,
    # Of several devices each would have one search, whatever the width.
    jax.devices()[:1],
  )
  assert [(r["width"], r["restarts"]) for r in rows] == [
    (1, 1),
    (1, 3),
    (3, 1),
    (3, 3),
  ]
  assert all(r["seconds"] > 0 for r in rows)
  assert [r["steps"] for r in rows] == [20, 60, 20, 60]
  # Widths change who is searched beside whom, not what is found.
  one, three, wide_one, wide_three = (r["objective"] for r in rows)
  assert three < one
  np.testing.assert_allclose([wide_one, wide_three], [one, three], rtol=1e-3)


def test_the_table_says_how_many_times_one_start_takes():
  rows = [
    {
      "model": "mlp",
      "attack": "dlg",
      "width": width,
      "restarts": n,
      "seconds": s,
    }
    for width, n, s in [(1, 1, 2.0), (1, 4, 5.0), (8, 1, 2.5), (8, 4, 3.0)]
  ]
  assert restarts.markdown(rows).splitlines()[2:] == [
    "| `mlp` | `dlg` | 1 | 2 (1.0) | 5 (2.5) |",
    "| `mlp` | `dlg` | 8 | 2.5 (1.2) | 3 (1.5) |",
  ]


@pytest.mark.parametrize("name", ["rgap", "analytic"])
def test_a_closed_form_has_no_starting_points(name):
  with pytest.raises(errors.UserError, match="does not search"):
    restarts.measure(f"mlp:{name}", "mnist_sample", 0, [1], [1], 1)
