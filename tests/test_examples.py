"""The scripts of `examples/` run as their first lines say, and stay short."""

import os
import pathlib
import subprocess
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
SAYS = {
  "codec_in_optax.py": "bytes a step",
  "own_gradient.py": "PSNR 1",
  "own_images.py": "The report is",
  "own_model.py": "rebuilt 2 of 2 images",
  "sweep.py": "ratio 0.99: accuracy",
}


def test_all_are_tested_and_short():
  scripts = {path.name: path.read_text() for path in EXAMPLES.glob("*.py")}
  assert scripts.keys() == SAYS.keys()
  for name, text in scripts.items():
    code = [line for line in text.split('"""', 2)[2].splitlines() if line]
    assert len(code) < 40, f"{name} has {len(code)} lines"
    assert f"python examples/{name}" in text


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SAYS))
def test_it_runs(name, tmp_path):
  done = subprocess.run(
    [sys.executable, f"examples/{name}", str(tmp_path)],
    cwd=EXAMPLES.parent,
    env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent)},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  assert SAYS[name] in done.stdout
