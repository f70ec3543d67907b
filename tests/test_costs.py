"""The task `costs`: what it measures is what the parts do."""

import json

import jax
import numpy as np
import pytest

from experiments import attack, config, costs, main, setting
from mpqfl_jax import ckks, defenses, encrypted, errors, he, trees
from mpqfl_jax.report import costs as table
from tests import browser

SPECS = (
  "none",
  "int4",
  "dp_gaussian(noise_multiplier=0.5)",
  "dp_sgd",
  "dp_central",
  "he(keys=per_client)",
)


def values(output_dir, **changes):
  return config.make(
    **{
      "task": "costs",
      "output_dir": str(output_dir),
      "model": "mlp",
      "num_clients": 60,
      "cohort_size": 4,
      "batch_size": 4,
      "defense": SPECS,
      "scaling_clients": "3,40",
      "devices": 1,
      **changes,
    }
  )


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
  run = main.run(values(tmp_path_factory.mktemp("costs") / "run"))
  lines = (run / "costs.jsonl").read_text().splitlines()
  found = {line["defense"]: line for line in map(json.loads, lines)}
  return run, found


def test_every_defence_has_a_line(measured):
  run, found = measured
  assert list(found) == list(SPECS)
  summary = json.loads((run / "summary.json").read_text())
  assert summary["task"] == "costs"
  assert summary["defenses"]["dp_gaussian(noise_multiplier=0.5)"]["epsilon"] > 0
  for spec, line in found.items():
    assert summary["defenses"][spec]["costs"] == line
    for name in ("train_seconds", "send_seconds", "server_seconds"):
      assert 0 < line[name] < 10


def test_the_page(measured, tmp_path):
  run, found = measured
  text = (run / "report.html").read_text()
  dearest = max(found.values(), key=lambda line: line["uplink_bytes"])
  assert f"and {dearest['uplink_bytes']:,} ({dearest['defense']})" in (
    text.replace("\N{NO-BREAK SPACE}", " ")
  )
  for spec in SPECS:
    assert f"{spec}: {found[spec]['uplink_bytes']:,} bytes, client" in text
  browser.check(run / "report.html", tmp_path)


def test_bytes_are_those_of_the_messages(measured):
  _, found = measured
  built = setting.build(values("unused"))
  sent, size = attack.broadcast(values("unused"), built)
  for spec in SPECS[:-1]:
    codec = defenses.make(spec, built.template).codec
    payload, _ = codec.encode(
      jax.random.key(1), sent.params, codec.init(sent.params)
    )
    message = codec.pack(jax.device_get(payload))
    assert found[spec]["uplink_bytes"] == len(message)
    assert found[spec]["downlink_bytes"] == size
    assert found[spec]["open_seconds"] == 0 == found[spec]["key_holder_bytes"]
  secret = found[SPECS[-1]]
  assert secret["uplink_bytes"] > 4 * trees.size(built.template)
  assert secret["downlink_bytes"] == size + 48
  assert secret["open_seconds"] > 0 and secret["key_holder_bytes"] > size


def test_private_gradients_cost_more_time_than_plain_ones(measured):
  _, found = measured
  assert found["dp_sgd"]["train_seconds"] > found["none"]["train_seconds"]


def test_the_client_is_one_of_median_size(measured):
  _, found = measured
  sizes = np.sort(setting.build(values("unused")).clients.sizes)
  assert found["none"]["examples"] == sizes[len(sizes) // 2]


def test_keys_of_their_own_grow_with_the_clients_and_shared_ones_do_not():
  chosen = {
    keys: encrypted.options(keys, 4096, None, 4.0, None, 3, False)
    for keys in ("shared", "per_client")
  }
  few, many = (encrypted.keys_for(chosen["per_client"], n) for n in (5, 50))
  assert (few.key_pairs, many.key_pairs) == (5, 50)
  # Compressed, a key is a few bytes longer or shorter than another.
  assert many.key_bytes == pytest.approx(10 * few.key_bytes, rel=0.01)
  # The least of several: a pause of the machine is no key's cost.
  times = {
    n: min(
      encrypted.keys_for(chosen["per_client"], n).key_seconds for _ in range(4)
    )
    for n in (5, 50)
  }
  assert 3 < times[50] / times[5] < 30
  few, many = (encrypted.keys_for(chosen["shared"], n) for n in (5, 50))
  assert (few.key_pairs, many.key_pairs) == (1, 1)
  assert many.key_bytes * 4 == pytest.approx(few.key_bytes * 49, rel=0.01)
  # What is handed out is what a run says of it.
  protocol = encrypted.protocol(chosen["shared"], 5, 50)
  handed = protocol.set_up.key_bytes
  assert many.key_bytes == pytest.approx(handed, rel=0.01)


def test_a_pair_takes_what_is_said_of_many():
  chosen = encrypted.options("per_client", 4096, None, 4.0, None, 3, False)
  params = ckks.parameters(20, 4.0, 4096, encrypted.MODULUS_BITS)
  pairs = [he.key_pair(params) for _ in range(20)]
  size = sum(len(pair.public.serialized) for pair in pairs)
  counted = encrypted.keys_for(chosen, 20).key_bytes
  assert counted == pytest.approx(size, rel=0.01)


def test_the_table_says_it_in_words(measured):
  _, found = measured
  text = table.markdown(list(found.values()))
  rows = [line.split(" | ") for line in text.splitlines()]
  assert rows[0][1] == "Uplink, bytes" and len(rows) == 2 + len(SPECS)
  assert rows[2][-1] == "none |" and "for 40 |" in rows[-1][-1]
  assert f"{found['int4']['uplink_bytes']:,}" in rows[3]


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"attack": ("dlg",)}, "Expected no --attack"),
    ({"algorithm": "scaffold"}, "scaffold sends two"),
    ({"cohort_size": 100}, "larger than"),
  ],
)
def test_what_cannot_be_measured_is_said_in_one_line(changes, words, tmp_path):
  with pytest.raises(errors.UserError, match=words):
    main.run(values(tmp_path / "run", **changes))
  assert not (tmp_path / "run").exists()


def test_a_time_is_the_least_of_many_and_the_result_the_first():
  calls = []

  def fn():
    calls.append(len(calls))
    return len(calls)

  first, seconds = costs._timed(fn)
  assert first == 1 and len(calls) > costs._REPEATS and 0 < seconds < 0.1
