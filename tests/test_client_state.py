"""Stores of clients' states against a dictionary, through crashes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpqfl_jax import client_state, errors

CLIENTS = 30
FIRST = {
  "a": jnp.full((2, 3), jnp.nan, jnp.float32),
  "b": (jnp.int32(7), jnp.zeros(2, jnp.bool_)),
}


def _make(name, path, clients=CLIENTS):
  return client_state.make(name, FIRST, clients, None, path / "rows")


def _states(rng, count):
  return {
    "a": rng.standard_normal((count, 2, 3)).astype(np.float32),
    "b": (
      rng.integers(-9, 9, count).astype(np.int32),
      rng.integers(0, 2, (count, 2)).astype(np.bool_),
    ),
  }


def _row(states, i):
  return jax.tree.map(lambda leaf: np.asarray(leaf)[i], states)


def _assert_holds(store, held, want):
  ids = np.arange(CLIENTS)[::-1]
  got = store.gather(held, ids)
  for place, i in enumerate(ids):
    for x, y in zip(
      jax.tree.leaves(_row(got, place)),
      jax.tree.leaves(want.get(int(i), FIRST)),
      strict=True,
    ):
      np.testing.assert_array_equal(x, y)
      assert np.asarray(x).dtype == np.asarray(y).dtype


def _saved(held):
  """What a checkpoint would have of it."""
  return jax.tree.map(np.array, jax.device_get(held))


@pytest.mark.parametrize("name", ["device", "host", "disk"])
def test_a_store_is_a_dictionary(name, tmp_path):
  rng, store = np.random.default_rng(0), _make(name, tmp_path)
  held, want = store.open(store.init()), {}
  _assert_holds(store, held, want)
  for step in range(12):
    ids = rng.choice(CLIENTS, 7, replace=False)
    states = _states(rng, 7)
    held = store.scatter(held, ids, jax.tree.map(jnp.asarray, states))
    want |= {int(i): _row(states, k) for k, i in enumerate(ids)}
    if step % 3 == 2:
      store.before_save()
      held = store.open(_saved(held)) if step == 8 else held
      store.after_save()
  _assert_holds(store, held, want)
  store.remove()
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seed", range(20))
def test_rows_on_disk_outlive_a_crash_at_any_moment(seed, tmp_path):
  """Any kept checkpoint comes back whole, whatever was written since."""
  rng = np.random.default_rng(seed)
  store = _make("disk", tmp_path)
  held, want, kept = store.open(store.init()), {}, []
  for _ in range(120):
    kind = rng.choice(
      ["write", "save", "crash", "older"], p=[0.7, 0.2, 0.05, 0.05]
    )
    if kind == "write":
      count = int(rng.integers(1, 9))
      ids = rng.choice(CLIENTS, count, replace=False)
      states = _states(rng, count)
      held = store.scatter(held, ids, states)
      want |= {int(i): _row(states, k) for k, i in enumerate(ids)}
    elif kind == "save":
      store.before_save()
      kept = [*kept, (_saved(held), dict(want))][-2:]
      store.after_save()
    else:
      # A process that dies leaves the file as it is; "older": the newest
      # checkpoint was found to be damaged.
      if kind == "older" and len(kept) == 2:
        kept.pop()
      saved, want = kept[-1] if kept else (store.init(), {})
      want = dict(want)
      store = _make("disk", tmp_path)
      held = store.open(saved)
    _assert_holds(store, held, want)


def test_the_file_does_not_grow_for_ever(tmp_path):
  rng, store = np.random.default_rng(0), _make("disk", tmp_path)
  held = store.open(store.init())
  row = 2 * 3 * 4 + 4 + 2
  for _ in range(50):
    for _ in range(3):
      ids = rng.choice(CLIENTS, 5, replace=False)
      held = store.scatter(held, ids, _states(rng, 5))
    store.after_save()
  # All clients, and what three rounds of five write in two intervals and the
  # one in between.
  assert (tmp_path / "rows").stat().st_size <= row * (CLIENTS + 3 * 15)
  never = client_state.make("disk", FIRST, CLIENTS, None, tmp_path / "never")
  held = never.open(never.init())
  for _ in range(20):
    held = never.scatter(held, np.arange(5), _states(rng, 5))
  assert (tmp_path / "never").stat().st_size == 5 * row


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_a_damaged_row_is_not_taken(damage, tmp_path):
  rng, store = np.random.default_rng(0), _make("disk", tmp_path)
  held = store.open(store.init())
  held = store.scatter(held, np.arange(9), _states(rng, 9))
  file = tmp_path / "rows"
  data = bytearray(file.read_bytes())
  data[40] ^= 1
  file.write_bytes(data if damage == "flip" else data[:-1])
  again = _make("disk", tmp_path)
  held = again.open(_saved(held))
  with pytest.raises(errors.UserError, match="damaged"):
    again.gather(held, np.arange(9))


def test_a_million_clients_cost_what_has_been_written(tmp_path):
  store = _make("disk", tmp_path, clients=1_000_000)
  held = store.open(store.init())
  ids = np.array([999_999, 0, 500_000])
  states = _states(np.random.default_rng(0), 3)
  held = store.scatter(held, ids, states)
  got = store.gather(held, ids)
  np.testing.assert_array_equal(got["a"], states["a"])
  assert (tmp_path / "rows").stat().st_size == 3 * 30
  assert sum(leaf.nbytes for leaf in held) == 8_000_000


@pytest.mark.parametrize(
  "clients, memory, want",
  [
    (100, None, "device"),
    (10_000_000, None, "host"),
    (1_000_000_000, None, "disk"),
    (10_000_000, 2**36, "device"),
    (100_000_000, 2**36, "device"),
    (1_000_000_000, 2**36, "disk"),
  ],
)
def test_auto_picks_by_size(clients, memory, want):
  found = client_state.place("auto", FIRST, clients, 10, 1, memory)
  assert found.name == want and found.num_bytes == 30 * clients
  assert f"{found.num_bytes:,}" in found.reason


@pytest.mark.parametrize(
  "row, cohort, together, want",
  [
    (30, 10, 1, 10),
    (2**20, 1_000, 1, 256),
    (2**20, 1_000, 24, 240),
    (30, 1_000_000, 1, 4096),
    (30, 1_000_000, 24, 4080),
    (30, 10_000_000, 9_000_000, 9_000_000),
    (0, 1_000_000, 8, 4096),
  ],
)
def test_a_block_is_what_fits(row, cohort, together, want):
  state = jax.ShapeDtypeStruct((row,), np.uint8)
  found = client_state.place("host", state, 10**8, cohort, together)
  assert found.block == want


@pytest.mark.parametrize("name", ["device", "host", "disk"])
def test_nobody_has_no_state(name, tmp_path):
  rng, store = np.random.default_rng(0), _make(name, tmp_path)
  held = store.open(store.init())
  everyone = _states(rng, CLIENTS)
  held = store.scatter(held, np.arange(CLIENTS), everyone)
  ids = np.array([3, -1, 7, -1])
  assert len(store.gather(held, ids)["a"]) == 4
  states = _states(rng, 4)
  held = store.scatter(held, ids, states)
  want = {i: _row(everyone, i) for i in range(CLIENTS)}
  _assert_holds(store, held, want | {3: _row(states, 0), 7: _row(states, 2)})


def test_unknown_places_are_refused():
  with pytest.raises(errors.UserError, match="Did you mean 'disk'"):
    client_state.place("dsk", FIRST, 1, 1)
