"""What is saved comes back to the bit, or is passed over with a word."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

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


def test_any_damaged_file_falls_back_and_says_so(tmp_path):
  checkpoint.save(tmp_path, 1, _tree(1))
  checkpoint.save(tmp_path, 2, _tree(2))
  newest = tmp_path / "step_00000002"
  files = [p for p in newest.rglob("*") if p.is_file() and p.stat().st_size]
  outcomes = set()
  for path in files:
    kept = path.read_bytes()
    for damage in (b"", kept[: len(kept) // 2], bytes(len(kept))):
      path.write_bytes(damage)
      said = []
      step, tree = checkpoint.restore_latest(tmp_path, _tree(), said.append)
      # Some files are not needed to read the arrays; never wrong ones.
      _assert_same(tree, _tree(step))
      assert (step == 1) == bool(said)
      outcomes.add(step)
    path.write_bytes(kept)
  assert outcomes == {1, 2} or outcomes == {1}


def test_another_shape_is_not_taken(tmp_path):
  checkpoint.save(tmp_path, 1, _tree())
  other = _tree() | {"counts": np.arange(6)}
  said = []
  assert checkpoint.restore_latest(tmp_path, other, said.append) is None
  assert said
