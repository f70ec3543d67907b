"""Rounds over ciphertexts: the same as in the clear, and who reads what."""

import functools
import json

from absl import flags
from absl.testing import flagsaver
import jax
import numpy as np
import optax
import pytest

from experiments import main
from mpqfl_jax import ckks, defenses, encrypted, errors, he, local
from mpqfl_jax.types import Cohort
from tests import small, test_threshold

IDS = [3, 0, 9, 5, 7]
KEYS = [
  "shared",
  "per_client",
  pytest.param("threshold", marks=test_threshold.needs_openfhe),
]


def chosen(**changes) -> encrypted.Options:
  given = ",".join(f"{k}={v}" for k, v in changes.items())
  params = small.model().init(jax.random.key(0))
  made = defenses.make(f"he({given})" if given else "he", params).encryption
  assert made is not None
  return made


def training() -> local.LocalTraining:
  schedule = local.Schedule(4, int(small.SIZES.max()), 2, None)
  return local.sgd(small.model(), optax.sgd, schedule)


def run(protocol=None, watched=(-1, -1), **changes):
  algorithm = small.algorithm(training(), protocol=protocol, **changes)
  state = algorithm.init(jax.random.key(0))
  aux = None
  for i in range(2):
    state, aux = algorithm.round(
      state,
      small.examples(),
      small.cohort(IDS),
      np.array(watched, np.int32),
      jax.random.fold_in(jax.random.key(1), i),
    )
  return state, aux


@functools.cache
def in_the_clear():
  return run(watched=(9, 3), dropout=0.3, server=("adam", 0.01))


@pytest.mark.parametrize("keys", KEYS)
def test_a_round_gives_the_model_that_it_gives_in_the_clear(keys):
  protocol = encrypted.protocol(chosen(keys=keys), len(IDS), 11)
  plain, clear = in_the_clear()
  sealed, aux = run(
    protocol, watched=(9, 3), dropout=0.3, server=("adam", 0.01)
  )
  for a, b in zip(*map(jax.tree.leaves, (plain, sealed)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)
  arrived, accepted = map(
    np.asarray, (aux.clients.arrived, aux.clients.accepted)
  )
  np.testing.assert_array_equal(accepted, clear.clients.accepted)
  assert 3 <= accepted.sum() < len(IDS)
  assert aux.encrypted.costs.relative_error < 1e-4
  # 28 values go into one ciphertext of 2 * 4096 coefficients of 54 bits; one
  # of OpenFHE's has 64 bits for each of 60.
  sent = aux.clients.uplink_bytes
  bits = 64 if keys == "threshold" else 54
  whole = aux.encrypted.costs.attempts * 8192 * bits / 8
  np.testing.assert_allclose(sent[accepted], whole, rtol=0.15)
  assert (sent[~arrived] == 0).all()
  # The server has ciphertexts of the watched clients, and nothing else.
  present = {c for c, a in zip(IDS, arrived, strict=True) if a} & {9, 3}
  assert set(aux.encrypted.seen) == present
  assert not jax.tree.leaves(aux.payloads)
  assert all(seen.update is None for seen in aux.encrypted.seen.values())


def test_with_the_key_the_server_reads_the_update():
  _, clear = in_the_clear()
  protocol = encrypted.protocol(chosen(attacker_holds_key=True), len(IDS), 11)
  many = run(
    protocol,
    watched=(9, 3),
    dropout=0.3,
    server=("adam", 0.01),
    plan="vmap",
    devices=2,
  )[1]
  template = small.model().init(jax.random.key(0))
  codec = defenses.make("none", template).codec
  assert many.encrypted.seen
  for client, seen in many.encrypted.seen.items():
    slot = (9, 3).index(client)
    payload = jax.tree.map(lambda leaf: leaf[slot], clear.payloads)
    sent = codec.decode(payload)
    for a, b in zip(*map(jax.tree.leaves, (sent, seen.update)), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert len(seen.message) == many.clients.uplink_bytes[IDS.index(client)]


class Round:
  """One call of a protocol, on updates made up here."""

  def __init__(self, options, clients=5, ready=None, arrived=None):
    rng = np.random.default_rng(0)
    self.sizes = np.array([4, 1, 8, 2, 5], np.int32)[:clients]
    ids = np.arange(10, 10 + clients, dtype=np.int32)
    self.updates = {"w": rng.normal(0, 0.1, (clients, 7)).astype(np.float32)}
    self.arrived = np.ones(clients, bool) if arrived is None else arrived
    self.ready = self.arrived if ready is None else ready
    self.cohort = Cohort(ids, np.zeros_like(ids), self.sizes)
    self.protocol = encrypted.protocol(options, clients, 20)

  def __call__(self, seed=0):
    return self.protocol.combine(
      self.updates,
      self.ready,
      self.arrived,
      self.cohort,
      [10, 12],
      1000,
      jax.random.key(seed),
    )

  def mean(self, taking):
    return np.average(
      self.updates["w"][taking].astype(np.float64),
      axis=0,
      weights=self.sizes[taking],
    )


def test_a_key_holder_that_drops_out_costs_a_second_encryption():
  arrived = np.array([False, True, True, True, True])
  turn = Round(chosen(keys="per_client"), arrived=arrived)
  outcome = turn()
  assert outcome.costs.attempts == 2 and outcome.costs.key_pairs == 2
  assert outcome.costs.key_holder == 11
  np.testing.assert_allclose(outcome.update["w"], turn.mean(arrived), rtol=1e-5)
  one = 8192 * 54 / 8
  np.testing.assert_allclose(
    outcome.uplink_bytes, [0, *[2 * one] * 4], rtol=0.15
  )
  # With a shared key anybody who is there opens the sum.
  shared = Round(chosen(), arrived=arrived)()
  assert shared.costs.attempts == 1 and shared.costs.key_holder == 11


@test_threshold.needs_openfhe
def test_a_member_that_drops_out_costs_a_second_key():
  arrived = np.array([True, True, False, True, True])
  turn = Round(chosen(keys="threshold"), arrived=arrived)
  outcome = turn()
  assert outcome.costs.attempts == 2 and outcome.costs.key_pairs == 5 + 4
  np.testing.assert_allclose(outcome.update["w"], turn.mean(arrived), rtol=1e-4)


def test_a_client_that_cannot_encode_its_update_is_left_out():
  turn = Round(chosen())
  turn.updates["w"][2, 3] = 4.5
  outcome = turn()
  rest = np.array([True, True, False, True, True])
  np.testing.assert_array_equal(outcome.accepted, rest)
  np.testing.assert_allclose(outcome.update["w"], turn.mean(rest), rtol=1e-5)
  assert outcome.uplink_bytes[2] == 0 and 12 not in outcome.seen
  turn.updates["w"][0] = np.nan
  turn.ready = np.array([False, True, True, True, True])
  rest[0] = False
  np.testing.assert_allclose(turn().update["w"], turn.mean(rest), rtol=1e-5)


@pytest.mark.parametrize("keys", ["shared", "per_client"])
def test_whole_numbers_add_up_and_repeat(keys):
  bound, bits = 0.15, 8
  options = chosen(keys=keys, bits=bits, bound=bound)
  turn = Round(options)
  outcome = turn()
  assert outcome.accepted.all() and outcome.costs.attempts == 1
  u, w = turn.updates["w"].astype(np.float64), turn.sizes / turn.sizes.max()
  assert outcome.costs.clipped_share == np.mean(np.abs(u) > bound) > 0
  # What each sent is a whole number of levels next to its weighted entry.
  levels = 2 ** (bits - 1) - 1
  entries = w[:, None] * np.clip(u, -bound, bound) / bound * levels
  low, high = np.floor(entries).sum(axis=0), np.ceil(entries).sum(axis=0)
  found = outcome.update["w"] * w.sum() / bound * levels
  np.testing.assert_allclose(found, np.rint(found), atol=1e-3)
  assert (low - 1e-3 <= found).all() and (found <= high + 1e-3).all()
  exact = turn.mean(outcome.accepted)
  error = np.linalg.norm(outcome.update["w"] - exact) / np.linalg.norm(exact)
  assert outcome.costs.relative_error == pytest.approx(error, rel=1e-4)
  # Ciphertexts never repeat; what they hold does, by the round's key.
  again, other = Round(options)(), Round(options)(seed=1)
  np.testing.assert_array_equal(again.update["w"], outcome.update["w"])
  assert (other.update["w"] != outcome.update["w"]).any()
  # One ciphertext of 4096 slots either way: 7 values leave most of it empty.
  np.testing.assert_allclose(outcome.uplink_bytes, 8192 * 54 / 8, rtol=0.15)


def test_rounding_keeps_the_mean_in_the_mean():
  turn = Round(chosen(bits=3, bound=0.6))
  found = np.mean([turn(seed=i).update["w"] for i in range(100)], axis=0)
  w = turn.sizes / turn.sizes.max()
  # A level's width a client at most, a quarter in variance.
  spread = 0.6 / 3 / 2 * np.sqrt(len(w) / 100) / w.sum()
  np.testing.assert_allclose(found, turn.mean(w > 0), atol=4.5 * spread)


def test_who_holds_the_key_reads_rounded_entries():
  params = small.model().init(jax.random.key(0))
  defense = defenses.make(
    "he(bits=6,bound=0.5,attacker_holds_key=true)", params
  )
  options = defense.encryption
  assert options is not None and defense.unreadable is None
  rng = np.random.default_rng(3)
  update = jax.tree.map(
    lambda p: rng.uniform(-0.4, 0.4, p.shape).astype(np.float32), params
  )
  errors_ = []
  for client in range(20):
    seen = encrypted.seen_alone(options, update, jax.random.key(5), client)
    assert seen.update is not None
    pairs = zip(*map(jax.tree.leaves, (update, seen.update)), strict=True)
    errors_ += [(b - a).ravel() for a, b in pairs]
  error = np.concatenate(errors_)
  assert np.abs(error).max() < 0.5 / 31 + 1e-6
  # What an adaptive attacker is told of it.
  assert defense.noise_stddev == pytest.approx(np.std(error), rel=0.1)
  payload, _ = defense.codec.encode(
    jax.random.key(0), update, defense.codec.init(update)
  )
  known = jax.tree.leaves(defenses.bins(defense, payload).variance)
  assert known[0].ravel()[0] == pytest.approx(np.var(error), rel=0.2)


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("present", [0, 1, 2])
def test_a_sum_of_too_few_is_not_opened(keys, present):
  arrived = np.arange(5) < present
  outcome = Round(chosen(keys=keys), arrived=arrived)()
  assert not outcome.accepted.any() and not outcome.update["w"].any()
  assert outcome.costs.key_holder == -1
  assert outcome.costs.relative_error is None
  assert (outcome.uplink_bytes > 0).sum() == present


def test_costs_of_keys():
  shared = Round(chosen()).protocol.set_up
  assert shared.key_pairs == 1
  pair = he.key_pair(ckks.parameters(5))
  each = len(pair.serialized) + len(pair.public.serialized) + 48
  assert shared.key_bytes == pytest.approx(19 * each, rel=0.01)
  turn = Round(chosen(keys="per_client"))
  assert turn.protocol.set_up == encrypted.SetUp(0, 0.0, 0)
  first, second = turn().costs, turn().costs
  assert (first.key_pairs, second.key_pairs) == (1, 0)
  public = len(pair.public.serialized)
  assert first.key_bytes == pytest.approx(5 * public, rel=0.01)
  # The sum down to the holder, the model up for each of the next cohort.
  model = first.key_holder_bytes - 5 * (1000 + 48)
  assert model == pytest.approx(8192 * 54 / 8, rel=0.15)


@pytest.mark.parametrize(
  "spec, words",
  [
    ("he(keys=mine)", "unknown keys"),
    ("he(min_clients=2)", "min_clients=2"),
    ("he(attacker_holds_key=perhaps)", "true or false"),
    ("he(keys=per_client,attacker_holds_key=true)", "keys=shared"),
    ("he(modulus_bits=60)", "128 bits"),
    ("he(modulus_bits=30)", "too small"),
    ("he(bits=8)", "without a bound"),
    ("he(bits=1,bound=0.1)", "from 2 to 16"),
    ("he(bits=8,bound=0.1,modulus_bits=28)", "too small"),
    ("he(bits=8,bound=0.1,keys=threshold)", "no scheme"),
    ("he(clip=1)", "unknown parameter"),
    ("he(keys=threshold,modulus_bits=54)", "Expected none"),
    ("he(keys=threshold,degree=2048)", "128 bits"),
  ],
)
def test_options_that_make_no_sense_are_refused(spec, words):
  params = small.model().init(jax.random.key(0))
  with pytest.raises(errors.UserError, match=words):
    defenses.make(spec, params)


FLAGS = ("--model=mlp", "--num_clients=400", "--batch_size=4", "--devices=1")


def execute(*args: str) -> int:
  with flagsaver.flagsaver():
    return main.execute(flags.FLAGS(["main", *FLAGS, *args]))


@pytest.mark.parametrize(
  "args, words",
  [
    (("--cohort_size=2",), "min_clients=3"),
    (("--aggregator=median",), "hides"),
    (("--algorithm=scaffold",), "control variate"),
    (("--cohort_size=400", "--defense=he(modulus_bits=36)"), "too small"),
  ],
)
def test_a_run_that_cannot_be_encrypted_is_refused(
  tmp_path, capsys, args, words
):
  out = tmp_path / "run"
  assert execute("--defense=he", f"--output_dir={out}", *args) == 2
  assert words in capsys.readouterr().err
  assert not out.exists()


def read(path) -> list[dict]:
  return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_a_run_says_what_the_server_cannot_see(tmp_path):
  out = tmp_path / "run"
  key = "he(attacker_holds_key=true)"
  status = execute(
    f"--output_dir={out}",
    "--rounds=1",
    "--cohort_size=3",
    "--size_sigma=1.5",
    f"--defense=he,{key}",
    "--attack=dlg(iterations=2)",
    "--attack_clients=1",
  )
  assert status == 0
  summary = json.loads((out / "summary.json").read_text())["defenses"]
  cell = summary["he"]["attacks"]["dlg"]["blind"]
  assert cell["psnr_db_median"] is None and cell["success_rate"] is None
  assert "ciphertext" in cell["reason"]
  assert summary[key]["attacks"]["dlg"]["blind"]["psnr_db_median"] > 0
  sealed, opened = (
    [line for line in read(out / "attacks.jsonl") if line["defense"] == name]
    for name in ("he", key)
  )
  assert len(sealed) == len(opened) > 0
  assert set(sealed[0]) == {*opened[0], "reason"}
  assert sealed[0]["psnr_db"] is None and opened[0]["psnr_db"] > 0
  assert sealed[0]["image"] == opened[0]["image"]
  for entry in summary.values():
    assert entry["encryption"]["relative_error_max"] < 1e-4
    assert entry["encryption"]["key_pairs"] == 1
  first = read(out / "metrics.jsonl")[0]
  assert first["uplink_bytes"] == pytest.approx(
    3 * first["encryption"]["message_bytes"]
  )
  page = (out / "report.html").read_text()
  assert "the server sees ciphertext" in page and "Ciphertext" in page


@pytest.mark.slow
def test_an_attack_task_attacks_what_the_key_opens(tmp_path):
  out = tmp_path / "run"
  key = "he(attacker_holds_key=true)"
  status = execute(
    f"--output_dir={out}",
    "--task=attack",
    "--batch_size=1",
    "--attack_images=test:0-1",
    f"--defense=none,he,{key}",
    "--attack=analytic",
  )
  assert status == 0
  summary = json.loads((out / "summary.json").read_text())["defenses"]
  assert summary["he"]["attacks"]["analytic"]["blind"]["psnr_db_max"] is None
  opened = summary[key]["attacks"]["analytic"]["blind"]
  clear = summary["none"]["attacks"]["analytic"]["blind"]
  # The analytic attack is exact on an undefended update, and so on this one.
  assert opened["psnr_db_median"] > 40
  assert clear["psnr_db_median"] > 40
  ratio = (
    summary["he"]["uplink_bytes_per_client"]
    / summary["none"]["uplink_bytes_per_client"]
  )
  assert 7 < ratio < 9
