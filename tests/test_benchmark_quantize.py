"""The benchmark of codecs: how rounds are put together and shown."""

import json
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import quantize


def row(system, encode, decode, copy, codec="int8"):
  return {
    "system": system,
    "codec": codec,
    "kernels": "native" if system == "mpqfl_jax" else None,
    "elements": 100,
    "encode_gb_s": encode,
    "decode_gb_s": decode,
    "memcpy_gb_s": copy,
    "bits_per_element": 8.0,
    "snr_db": 30.0,
  }


ROUNDS = [
  row("mpqfl_jax", 20.0, 40.0, 40.0),
  row("qwix", 10.0, 20.0, 40.0),
  row("torch", 20.0, 10.0, 40.0),
  # A minute in which memory is half as fast.
  row("mpqfl_jax", 12.0, 20.0, 20.0),
  row("qwix", 5.0, 10.0, 20.0),
  row("torch", 10.0, 5.0, 20.0),
]


def test_a_rate_is_the_median_share_of_the_copy_beside_it():
  ours, _, _ = quantize.merge(ROUNDS)
  assert ours["memcpy_gb_s"] == 30.0
  np.testing.assert_allclose(ours["encode_shares"], [0.5, 0.6])
  np.testing.assert_allclose(ours["encode_gb_s"], 30 * 0.55)
  np.testing.assert_allclose(ours["decode_gb_s"], 30.0)


def test_the_table_pairs_rounds_with_the_faster_peer():
  lone = row("mpqfl_jax", 1.0, 1.0, 10.0, codec="drive")
  lines = quantize.markdown(quantize.merge([*ROUNDS, lone])).splitlines()
  assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|")
  assert lines[2] == (
    "| int8 | 8.00"
    " | 16.5 | 55% / 25% / 50% | 1.10 (1.00 to 1.20)"
    " | 30.0 | 100% / 50% / 25% | 2.00 (2.00 to 2.00) |"
  )
  assert lines[3].count(" - / - | - |") == 2


@pytest.mark.slow
def test_the_command_measures_every_codec(tmp_path):
  out = tmp_path / "rows.json"
  subprocess.run(
    [
      sys.executable,
      "-m",
      "benchmarks.quantize",
      "--elements=10000",
      "--rounds=1",
      f"--json={out}",
    ],
    check=True,
  )
  rows = json.loads(out.read_text())
  assert len({row["codec"] for row in rows}) == len(rows) >= 14
  for row in rows:
    assert row["encode_gb_s"] > 0 and row["decode_gb_s"] > 0
    assert row["memcpy_gb_s"] > 0 and row["elements"] == 10000
