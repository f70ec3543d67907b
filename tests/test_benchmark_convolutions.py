"""The benchmark of convolutions measures what it says, and checks it."""

import numpy as np
import pytest

from benchmarks import convolutions
from mpqfl_jax import errors


def test_rows_and_table():
  cases = [
    convolutions.Case("`a`", 6, (16, 32), 5),
    convolutions.Case("`b`", 4, (3, 2), 2),
  ]
  rows = [
    row
    for case in cases
    for row in convolutions.measure(case, 2, ["xla", "winograd"], 2)
  ]
  assert [row["form"] for row in rows] == ["xla", "winograd"] * 2
  assert all(0 < row["off"] < 1e-5 and row["seconds"] > 0 for row in rows)
  lines = convolutions.markdown(rows).splitlines()
  assert len(lines) == 4
  assert lines[2].startswith("| 6x6, 16 to 32, 5x5 (`a`) |")
  with pytest.raises(errors.UserError, match="Did you mean 'winograd'"):
    convolutions.measure(cases[0], 1, ["winogard"], 1)


def test_the_definition_by_hand():
  x = np.arange(9.0).reshape(1, 3, 3, 1)
  w = np.zeros((3, 3, 1, 1))
  w[1, 1], w[0, 1] = 2, 1
  d = np.zeros((1, 3, 3, 1))
  d[0, 0, 0], d[0, 2, 1] = 1, 10
  y, gx, gw = convolutions.exactly(x, w, d, [(1, 1)] * 2)
  # Twice the entry, and the one above it.
  assert y[0, ..., 0].tolist() == [[0, 2, 4], [6, 9, 12], [15, 18, 21]]
  assert gx[0, ..., 0].tolist() == [[2, 0, 0], [0, 10, 0], [0, 20, 0]]
  assert gw[1, 1, 0, 0] == 0 * 1 + 7 * 10
  assert gw[0, 1, 0, 0] == 4 * 10
