"""What is saved comes back to the bit, or is passed over with a word."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

from mpqfl_jax import checkpoint


def _tree(value=1.0):
  params = {
    "dense1": {"kernel": jnp.full((3, 4), float(value)), "bias": jnp.zeros(4)}
  }
  return {
    "params": params,
    "opt": optax.adam(1.0).init(params),
    "counts": np.arange(5),
    "none": (),
  }


def _assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert np.asarray(x).dtype == np.asarray(y).dtype
    np.testing.assert_array_equal(x, y)


def test_the_newest_comes_back_and_old_ones_go(tmp_path):
  for step in (3, 20, 100):
    checkpoint.save(tmp_path, step, _tree(step))
  assert checkpoint.steps(tmp_path) == [20, 100]
  said = []
  step, tree = checkpoint.restore_latest(tmp_path, _tree(), said.append)
  assert step == 100 and not said
  _assert_same(tree, _tree(100))


def test_nothing_there(tmp_path):
  assert checkpoint.restore_latest(tmp_path, _tree(), print) is None
  assert checkpoint.restore_latest(tmp_path / "no", _tree(), print) is None


def test_any_damaged_file_falls_back_before_it_is_read(tmp_path, monkeypatch):
  checkpoint.save(tmp_path, 1, _tree(1))
  checkpoint.save(tmp_path, 2, _tree(2))
  newest = tmp_path / "step_00000002"
  read = []
  restore = ocp.StandardCheckpointer.restore

  def watched(self, path, *args):
    read.append(path.name)
    return restore(self, path, *args)

  monkeypatch.setattr(ocp.StandardCheckpointer, "restore", watched)
  files = [p for p in newest.rglob("*") if p.is_file() and p.stat().st_size]
  assert len(files) > 3
  for path in files:
    kept = path.read_bytes()
    for damage in (b"", kept[: len(kept) // 2], bytes(len(kept))):
      path.write_bytes(damage)
      said = []
      step, tree = checkpoint.restore_latest(tmp_path, _tree(), said.append)
      assert step == 1 and len(said) == 1 and str(newest) in said[0]
      _assert_same(tree, _tree(1))
    path.unlink()
    assert checkpoint.restore_latest(tmp_path, _tree(), said.append)[0] == 1
    path.write_bytes(kept)
  assert set(read) == {"step_00000001"}
  assert checkpoint.restore_latest(tmp_path, _tree(), said.append)[0] == 2


def test_a_damaged_one_is_replaced_and_what_was_left_is_removed(tmp_path):
  checkpoint.save(tmp_path, 1, _tree(1))
  checkpoint.save(tmp_path, 2, _tree(2))
  (tmp_path / "step_00000002" / "files.json").write_text("{}")
  for name in ("partial", "partial.orbax-checkpoint-tmp-1"):
    (tmp_path / name).mkdir()
    (tmp_path / name / "rest").write_text("cut short")
  checkpoint.save(tmp_path, 2, _tree(3))
  said = []
  step, tree = checkpoint.restore_latest(tmp_path, _tree(), said.append)
  assert step == 2 and not said
  _assert_same(tree, _tree(3))
  assert sorted(p.name for p in tmp_path.iterdir()) == [
    "step_00000001",
    "step_00000002",
  ]


def test_another_shape_is_not_taken(tmp_path):
  checkpoint.save(tmp_path, 1, _tree())
  other = _tree() | {"counts": np.arange(6)}
  said = []
  assert checkpoint.restore_latest(tmp_path, other, said.append) is None
  assert said
