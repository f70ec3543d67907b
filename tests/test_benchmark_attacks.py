"""Systems solve one task, rows are what their files say, mistakes are named."""

import ast
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import attacks, attacks_peers, attacks_table
from mpqfl_jax import attacks as our_attacks
from mpqfl_jax import errors, models

ROOT = pathlib.Path(__file__).parents[1]
PEERS_DIR = ROOT / ".venv-peers"


def flags(*words):
  return attacks.parser().parse_args(words)


def test_the_suite_is_of_what_every_peer_can_run():
  args = flags("--suite", "--images=3")
  found = attacks.suite(args.suite, args.images)
  assert len(found) == 6
  for comparison in found:
    attacks.check(comparison, attacks.PEERS)
    known = comparison.attack == "inverting_gradients"
    assert comparison.labels_known == known
  assert {c.model for c in found} == set(attacks_peers.MODELS)
  assert flags().suite is None


def test_sizes_of_a_suite_are_set_by_its_flag():
  text = (
    "dlg(model=lenet_zhu), rgap(model=cnn6,images=1,labels_known=true),"
    "inverting_gradients(model=convnet,search=pixels)"
  )
  assert attacks.suite(text, 5) == [
    ("dlg", "lenet_zhu", 5, 0, False, ""),
    ("rgap", "cnn6", 1, 0, True, ""),
    ("inverting_gradients", "convnet", 5, 0, True, "pixels"),
  ]


@pytest.mark.parametrize(
  "text, words",
  [
    ("dlg(model=lenet_zhu,image=1)", "Did you mean 'images'"),
    ("dlg(images=1)", "names no model"),
    ("dlg(model=lenet_zhu", "parentheses do not match"),
  ],
)
def test_a_mistake_in_the_suite_is_named(text, words):
  with pytest.raises(errors.UserError, match=words):
    attacks.suite(text, 1)


@pytest.mark.parametrize(
  "comparison, words",
  [
    (("dgl", "lenet_zhu", 1), "unknown attack 'dgl'. Did you mean 'dlg'"),
    (("dlg", "lenet", 1), "unknown model 'lenet'"),
    (("map", "lenet_zhu", 1), "'map' is not compared with breaching"),
    (("dlg", "mlp", 1), "'mlp' is not compared .* lenet_zhu, convnet"),
    (("rgap", "lenet_zhu", 1), "one of: cnn6"),
    (("rgap", "cnn6", 1, 7), "--iterations=7: rgap is a closed form"),
    (("dlg", "lenet_zhu", 1, 0, True), "--labels_known: breaching's dlg"),
    (("dlg", "lenet_zhu", 0), "images=0 .* at least 1"),
    (("dlg", "lenet_zhu", 1, -1), "iterations=-1"),
    (("dlg", "lenet_zhu", 1, 0, False, "pixels"), "dlg with search=pixels"),
    (
      ("inverting_gradients", "lenet_zhu", 1, 0, True, "pixel"),
      "unknown search 'pixel'. Did you mean 'pixels'",
    ),
  ],
)
def test_what_cannot_be_compared_is_refused_before_anything_runs(
  comparison, words
):
  with pytest.raises(errors.UserError, match=words):
    attacks.check(attacks.Comparison(*comparison), ["breaching"])


def test_on_a_gpu_only_searches_are_compared():
  searched = attacks.Comparison("dlg", "lenet_zhu", 1)
  attacks.check(searched, ["breaching"], gpu=True)
  with pytest.raises(errors.UserError, match="rgap solves on the host"):
    attacks.check(attacks.Comparison("rgap", "cnn6", 1), [], gpu=True)


def test_all_systems_are_sent_to_the_gpu(tmp_path):
  python = tmp_path / "breaching" / "bin" / "python"
  python.parent.mkdir(parents=True)
  python.touch()
  comparison = attacks.Comparison(
    "inverting_gradients", "lenet_zhu", 1, search="pixels"
  )
  for words in ([], ["--gpu"]):
    args = flags(f"--peers_dir={tmp_path}", *words)
    for system in ("prepare", "ours", "breaching"):
      command, _ = attacks._command(args, comparison, system, tmp_path)
      assert ("--gpu" in command) == bool(words)
      assert ("--search=pixels" in command) == (system != "breaching")


def test_without_a_gpu_none_is_pretended():
  done = subprocess.run(
    [sys.executable, "-m", "benchmarks.attacks", "--gpu", "--images=1"],
    cwd=ROOT,
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
  )
  assert done.returncode and "JAX has no GPU here" in done.stderr


def test_without_a_peer_all_our_attacks_and_models_may_be_timed():
  attacks.check(attacks.Comparison("map", "mlp", 1, 5, True), [])
  with pytest.raises(errors.UserError, match="unknown peer 'torch'"):
    attacks.check(attacks.Comparison("dlg", "lenet_zhu", 1), ["torch"])


@pytest.mark.parametrize(
  "words, message",
  [
    (["--attack=dgl"], "unknown attack 'dgl'"),
    (["--peers=nobody"], "unknown peer 'nobody'"),
    (["--model=mlp", "--peers=breaching"], "'mlp' is not compared"),
    (["--suite=dlg"], "names no model"),
    (["--page=docs/attacks.md"], "expected --json"),
  ],
)
def test_the_command_line_says_what_is_wrong(
  words, message, monkeypatch, capsys
):
  monkeypatch.setattr(sys, "argv", ["attacks", *words])
  with pytest.raises(SystemExit) as stopped:
    attacks.main()
  assert stopped.value.code == 2
  assert message in capsys.readouterr().err


def test_a_peer_without_an_environment_is_said_to_lack_one(tmp_path):
  args = flags(f"--peers_dir={tmp_path}")
  with pytest.raises(SystemExit, match='make bench-peers PEERS="breaching"'):
    attacks._command(
      args, attacks.Comparison("dlg", "lenet_zhu", 1), "breaching", tmp_path
    )


def write_answer(folder, errors_of_images, **entries):
  """The files of a task of grey images, and of an answer that is off."""
  truth = np.full((len(errors_of_images), 4, 4, 3), 0.5, np.float32)
  off = np.asarray(errors_of_images, np.float32)[:, None, None, None]
  np.savez(folder / "task.npz", x=truth)
  attacks_peers.finish(
    folder,
    truth + off,
    iterations=40.0,
    seconds=12.0,
    compile_seconds=3.0,
    packages=("numpy",),
    **entries,
  )


def test_a_row_is_computed_from_the_files_of_a_system(tmp_path):
  # 1 / 0.1 and 1 / 0.01 are 20 and 40 dB, an exact image the cap of 100.
  write_answer(tmp_path, [0.0999, 0.2, 0.01, 0.0], commit="abc")
  comparison = attacks.Comparison("dlg", "lenet_zhu", 4, labels_known=True)
  row = attacks.row(flags("--first=7", "--seed=2"), comparison, "o", tmp_path)
  assert row["psnr_db_median"] == pytest.approx(30, abs=0.01)
  assert row["psnr_db_min"] == pytest.approx(-20 * np.log10(0.2), abs=1e-3)
  assert row["success_rate"] == 0.75
  assert row["seconds_per_image"] == 3.0
  assert row["ms_per_iteration_per_image"] == 75.0
  assert row["compile_seconds"] == 3.0 and row["commit"] == "abc"
  assert (row["first"], row["seed"], row["images"]) == (7, 2, 4)
  assert row["labels_known"] and row["version"] == f"numpy {np.__version__}"
  json.dumps(row)


def make_row(system, attack="dlg", model="lenet_zhu", seconds=2.0, **more):
  return {
    "system": system,
    "version": f"{system} 1",
    "attack": attack,
    "model": model,
    "dataset": "cifar10_sample",
    "first": 0,
    "images": 8,
    "labels_known": False,
    "search": "",
    "iterations": 100.0,
    "ms_per_iteration_per_image": 10 * seconds,
    "seconds_per_image": seconds,
    "psnr_db_median": 30.04,
    "psnr_db_min": 12.0,
    "compile_seconds": 5.0,
    "cpu": "a processor",
    "cores": 2,
    **more,
  }


def test_the_table_puts_a_peer_beside_us():
  rows = [
    make_row("ours"),
    make_row("breaching", seconds=5.0, psnr_db_median=20.0),
    make_row("ours", "rgap", "cnn6", 4.0, iterations=1.0),
    make_row("breaching", "rgap", "cnn6", 1234.0, iterations=1.0),
    make_row("ours", "map", seconds=1.0),  # Nobody beside it.
  ]
  text = attacks_table.markdown(rows)
  lines = text.splitlines()
  assert len(lines) == 6
  counts = {line.count("|") for line in lines[:4]}
  assert counts == {12}
  assert lines[2] == (
    "| `dlg` | `lenet_zhu` | 8 | found | 100 / 100 | 20 / 50 | 2 / 5 | 2.5 |"
    " 30.0 / 20.0 | 12.0 / 12.0 | 5.0 / 5.0 |"
  )
  assert "| closed form |  | 4 / 1234 | 308 |" in lines[3]
  for words in ("from number 0 on", "a processor, 2 cores", "breaching 1"):
    assert words in lines[-1]
  with pytest.raises(errors.UserError, match="no row of a peer"):
    attacks_table.markdown(rows[4:])


def test_the_table_names_the_device_and_the_search():
  rows = [
    make_row(system, "inverting_gradients", search="pixels", device="A GPU")
    for system in ("ours", "breaching")
  ]
  lines = attacks_table.markdown(rows).splitlines()
  assert lines[2].startswith("| `inverting_gradients(search=pixels)` |")
  assert "; A GPU; " in lines[-1] and "cores" not in lines[-1]
  # Another search is another comparison.
  assert (
    len(attacks.merge(rows, [make_row("ours", "inverting_gradients")])) == 3
  )


def test_a_comparison_that_is_run_anew_replaces_its_rows_alone():
  first = [make_row("ours"), make_row("breaching")]
  second = [make_row("ours", "rgap", "cnn6")]
  rows = attacks.merge(attacks.merge([], first), second)
  assert rows == first + second
  anew = [make_row("ours", seconds=9.0)]
  assert attacks.merge(rows, anew) == anew + second
  assert attacks.merge(rows, []) == rows


def test_the_table_of_a_file_goes_into_a_page(tmp_path, monkeypatch):
  source, page = tmp_path / "rows.json", tmp_path / "page.md"
  source.write_text(json.dumps([make_row("ours"), make_row("breaching")]))
  page.write_text("a\n<!-- beside: begin -->\nold\n<!-- beside: end -->\nb\n")
  monkeypatch.setattr(
    sys, "argv", ["attacks", f"--json={source}", f"--page={page}"]
  )
  attacks.main()
  text = page.read_text()
  assert "old" not in text and "| `dlg` | `lenet_zhu` | 8 |" in text
  assert text.startswith("a\n<!--") and text.endswith("-->\nb\n")


def test_the_attacks_page_has_a_place_for_the_table():
  text = (ROOT / "docs" / "attacks.md").read_text(encoding="utf-8")
  begin, end = (text.count(f"<!-- beside: {w} -->") for w in ("begin", "end"))
  assert begin == end == 1


def test_peers_import_nothing_of_this_package():
  tree = ast.parse(pathlib.Path(attacks_peers.__file__).read_text())
  found = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      found |= {alias.name.split(".")[0] for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      found.add((node.module or "").split(".")[0])
  assert "torch" in found
  assert not found & {"mpqfl_jax", "experiments", "benchmarks", "jax", "flax"}


def test_peers_know_our_models():
  assert set(attacks_peers.MODELS) <= set(models.MODELS)
  for supported in attacks_peers.SUPPORTED.values():
    assert set(supported) <= set(our_attacks.ATTACKS)
    for names in supported.values():
      assert set(names) <= set(attacks_peers.MODELS)
  layers = tuple(layer[2:] for layer in models.CNN6_LAYERS)
  assert layers == attacks_peers._CNN6
  assert models.CNN6_SLOPE == attacks_peers._CNN6_SLOPE
  stack = models._STACKS["lenet_zhu"][:-1]
  assert tuple((s.stride, s.padding) for s in stack) == attacks_peers._LENET


def test_a_peer_with_another_model_is_refused(tmp_path):
  np.savez(
    tmp_path / "task.npz",
    **{
      "logits": np.array([[1.0, -2.0]]),
      "norm/a/kernel": np.array([3.0]),
      "norm/a/bias": np.array([4.0]),
    },
  )
  task = np.load(tmp_path / "task.npz")
  logits, norms = np.array([1.0, -2.0]), {"a/kernel": 3.0, "a/bias": 4.0}
  attacks_peers.check(0, task, logits, norms)
  attacks_peers.check(0, task, logits + 1e-4, norms)
  with pytest.raises(SystemExit, match="image 0: the peer's logits are off"):
    attacks_peers.check(0, task, logits[::-1], norms)
  with pytest.raises(SystemExit, match=r"gradient of a/bias is off by 0\.2"):
    attacks_peers.check(0, task, logits, norms | {"a/bias": 5.0})
  with pytest.raises(SystemExit, match="logits are off by nan"):
    attacks_peers.check(0, task, logits * np.nan, norms)
  with pytest.raises(SystemExit, match="one system's gradient only: a/bias"):
    attacks_peers.check(0, task, logits, {"a/kernel": 3.0})


def run(tmp_path, *words):
  path = tmp_path / "rows.json"
  command = [sys.executable, "-m", "benchmarks.attacks", f"--json={path}"]
  subprocess.run([*command, *words], check=True, cwd=ROOT, capture_output=True)
  return json.loads(path.read_text())


@pytest.mark.slow
def test_our_system_is_timed_alone(tmp_path):
  words = ("--images=1", "--iterations=3", "--labels_known", "--first=2")
  (row,) = run(tmp_path, *words)
  assert (row["system"], row["iterations"], row["first"]) == ("ours", 3, 2)
  assert row["seconds_per_image"] > 0 and row["psnr_db_min"] > 0


@pytest.mark.slow
@pytest.mark.skipif(
  not (PEERS_DIR / "breaching" / "bin" / "python").exists(),
  reason="no breaching in .venv-peers: make bench-peers PEERS=breaching",
)
def test_breaching_attacks_the_same_model(tmp_path):
  both = "inverting_gradients(model={},images=1,iterations=2)"
  rows = run(
    tmp_path, "--suite=" + ",".join(map(both.format, ("lenet_zhu", "resnet20")))
  )
  assert [row["system"] for row in rows] == ["ours", "breaching"] * 2
  for row in rows:
    assert row["iterations"] == 2 and row["labels_known"]
  (ours, breaching) = run(
    tmp_path, "--images=1", "--iterations=20", "--peers=breaching"
  )
  assert ours["iterations"] == breaching["iterations"] == 20
