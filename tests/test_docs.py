"""The pages: the site builds without a warning, code is code, flags exist."""

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import config  # noqa: F401, defines the flags
from mpqfl_jax import datasets, models

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)


def blocks(language):
  """(page, text) of each block without a title."""
  return [
    (page.name, text)
    for page in PAGES
    for found, text in _BLOCK.findall(page.read_text(encoding="utf-8"))
    if found == language
  ]


def test_the_site_builds_without_a_warning(tmp_path):
  pytest.importorskip("mkdocs")
  done = subprocess.run(
    [
      *(sys.executable, "-m", "mkdocs", "build", "--strict"),
      *("--site-dir", str(tmp_path)),
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
  )
  assert done.returncode == 0, done.stderr[-2000:]
  names = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.html")}
  assert {"index.html", "tutorial.html", "reference/codecs.html"} <= names
  codecs = (tmp_path / "reference" / "codecs.html").read_text()
  # From the docstring of `precision.make`.
  assert "mpqfl_jax.precision.make" in codecs and "error_feedback" in codecs
  # Nothing is asked of another server.
  for page in tmp_path.rglob("*.html"):
    for tag in re.findall(r"<(?:script|link|img)[^>]+>", page.read_text()):
      assert not re.search(r'(?:src|href)="https?://', tag), (page, tag)


def names():
  """What the pages' fragments take for granted."""
  data = datasets.load("mnist_sample", None)
  model = models.make(
    "lenet_zhu", data.x_train.shape[1:], 10, data.mean, data.std, "slices"
  )
  params = model.init(jax.random.key(0))
  return {
    "jax": jax,
    "key": jax.random.key(1),
    "params": params,
    "update": jax.tree.map(jnp.ones_like, params),
    "model": model,
    "x": data.x_train[:1] / np.float32(255),
    "y": data.y_train[:1],
    "learning_rate": 0.1,
    "auxiliary": data.x_train[:300],
    "noise": np.full((1, len(jax.tree.leaves(params))), 1e-4),
  }


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({page for page, _ in blocks("python")}))
def test_the_code_of_a_page_runs(name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  space = names()
  if name == "attacks.md":
    from mpqfl_jax import attacks
    from mpqfl_jax.attacks import core, leakage
    from mpqfl_jax.types import Observation

    update = core.simulate(
      space["model"], space["params"], space["x"][None], space["y"][None], 0.1
    )
    seen = Observation(space["params"], update, None, None, jnp.float32(0.1))
    space |= {
      "attacks": attacks,
      "leakage": leakage,
      "observations": jax.tree.map(lambda a: jnp.asarray(a)[None], seen),
    }
  for page, text in blocks("python"):
    if page == name:
      exec(compile(text, name, "exec"), space)


def test_the_codec_of_the_readme_needs_nothing_else(capsys):
  (text,) = (text for page, text in blocks("python") if page == "README.md")
  exec(compile(text, "README.md", "exec"), {})
  assert "bytes instead of 2560" in capsys.readouterr().out


@pytest.mark.slow
def test_the_first_command_of_the_tutorial_takes_images_back(tmp_path):
  (line,) = (
    line
    for page, line in commands()
    if page == "tutorial.md" and "--output_dir=runs/first" in line
  )
  run = tmp_path / "first"
  words = [
    f"--output_dir={run}" if word.startswith("--output_dir") else word
    for word in shlex.split(line)[1:]
  ]
  done = subprocess.run(
    [sys.executable, *words], cwd=ROOT, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr[-2000:]
  found = json.loads((run / "summary.json").read_text())["defenses"]
  undefended = found["none"]["attacks"]["dlg"]["blind"]
  assert undefended["success_rate"] == 1
  assert undefended["psnr_db_median"] > 60


def commands():
  for page, text in blocks("sh"):
    for line in text.replace("\\\n", " ").splitlines():
      line = line.split("  #")[0].strip().removesuffix("&").strip()
      # Some lines run a command within a command of another program.
      if "python -m" in line and "-m" in shlex.split(line, comments=True):
        yield page, line


def test_there_are_commands():
  assert len(list(commands())) > 15


@pytest.mark.parametrize("page, line", list(commands()))
def test_a_command_names_modules_and_flags_that_exist(page, line):
  words = shlex.split(line, comments=True)
  at = words.index("-m")
  module, arguments = words[at + 1], words[at + 2 :]
  if module in ("pip", "pytest"):
    return
  assert (ROOT / f"{module.replace('.', '/')}.py").is_file()
  if module != "experiments.main":
    source = (ROOT / f"{module.replace('.', '/')}.py").read_text()
    for word in arguments:
      if word.startswith("--"):
        assert f'"{word.split("=")[0]}"' in source, word
    return
  for word in arguments:
    if word.startswith("--"):
      name, _, value = word[2:].partition("=")
      assert name in flags.FLAGS or name in ("help", "flagfile"), word
      if name == "flagfile" and value != "...":
        assert (ROOT / value).is_file(), value
