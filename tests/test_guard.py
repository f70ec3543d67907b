"""Policies found by predicted leakage, and the task that finds them."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import config, main
from mpqfl_jax import choice, errors, guard, policy, precision
from mpqfl_jax.attacks import leakage
from mpqfl_jax.report import html, tables
from mpqfl_jax.report import leakage as page
from tests import browser

PARAMS = {
  "a": {"kernel": jax.ShapeDtypeStruct((40,), jnp.float32)},
  "b": {"kernel": jax.ShapeDtypeStruct((64,), jnp.float32)},
  "c": {"kernel": jax.ShapeDtypeStruct((24,), jnp.float32)},
}


def problem(seed):
  """Three leaves of random Gram matrices and updates of two images."""
  rng = np.random.default_rng(seed)
  sizes = [leaf.size for leaf in jax.tree.leaves(PARAMS)]
  sensitivities, updates = [], []
  for _ in range(2):
    jacobians = [
      rng.standard_normal((6, n)) * rng.uniform(0.1, 10) for n in sizes
    ]
    update = jax.tree.map(
      lambda leaf: jnp.asarray(
        rng.standard_normal(leaf.shape) * rng.uniform(0.1, 2), jnp.float32
      ),
      PARAMS,
    )
    updates.append(update)
    sensitivities.append(
      leakage.Sensitivity(
        ("a/kernel", "b/kernel", "c/kernel"),
        np.stack([j @ j.T for j in jacobians]),
        np.array([float(jnp.mean(u**2)) for u in jax.tree.leaves(update)]),
        rng.uniform(0.1, 1, 6),
        0.05,
        12,
      )
    )
  return sensitivities, guard.tables(updates)


@pytest.mark.parametrize("seed", range(3))
def test_the_search_against_all_assignments(seed):
  sensitivities, known = problem(seed)
  limit, max_error = 110, 0.1
  found = guard.search(sensitivities, known, limit, max_error)
  share = (known.error / known.energy.sum(1)[:, None, None]).mean(0)
  leaves = np.arange(3)
  best = np.inf
  for picked in itertools.product(range(len(known.menu.options)), repeat=3):
    picked = np.array(picked)
    size = known.fixed + known.cost[leaves, picked].sum()
    if size > limit or share[leaves, picked].sum() > max_error:
      continue
    noise = known.error[:, leaves, picked] / known.entries
    noise[:, known.menu.kind[picked] == choice.WITHHELD] = np.inf
    best = min(best, leakage.expected_psnr_db(sensitivities, noise).mean())
  assert found.num_bytes <= limit and found.error <= max_error
  assert found.psnr_db >= best - 1e-9
  # A local search: near the best of the 2,744, not always the best.
  assert found.psnr_db <= best + 0.1


def test_the_bytes_are_those_of_the_message(tmp_path):
  sensitivities, known = problem(7)
  found = guard.search(sensitivities, known, 100, 0.3)
  path = tmp_path / "found.toml"
  rules = guard.rules(found, known, PARAMS)
  guard.write(path, rules, "A policy.")
  name, read = policy.read(path)
  assert name == "found" and read == rules
  codec = precision.make(str(path), PARAMS)
  update = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), PARAMS)
  payload, _ = codec.encode(jax.random.key(0), update, codec.init(update))
  assert len(codec.pack(jax.device_get(payload))) == found.num_bytes <= 100


def test_what_costs_as_much_as_float32_is_called_the_same():
  psnr = {f"psnr_db_predicted_{e}": 30.0 for e in ("median", "min", "max")}
  text = page.markdown(
    {
      "uplink_bytes_per_client_float32": 1000,
      "defenses": {
        "none": {"uplink_bytes_per_client": 1000, **psnr},
        "int4": {"uplink_bytes_per_client": 125, **psnr},
      },
      "references": {
        name: {"psnr_db_median": 10.0} for name in tables.REFERENCE_NAMES
      },
    }
  )
  assert "| none | 1,000 | same |" in text
  assert f"| int4 | 125 | 8.00{tables.TIMES} less |" in text


def test_bounds_that_nothing_keeps():
  sensitivities, known = problem(1)
  with pytest.raises(errors.UserError, match="keep the update's error within"):
    guard.search(sensitivities, known, 60, 0.001)


def test_what_is_withheld_reads_as_zero_and_proves_nothing():
  codec = precision.make("withheld", PARAMS)
  update = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), PARAMS)
  payload, _ = codec.encode(jax.random.key(0), update, codec.init(update))
  message = codec.pack(jax.device_get(payload))
  got = codec.decode(codec.unpack(message))
  assert all(not np.any(leaf) for leaf in jax.tree.leaves(got))
  bins = codec.bins(payload)
  assert all(np.all(np.isinf(v)) for v in jax.tree.leaves(bins.variance))
  assert len(message) == codec.num_bytes(payload)


def test_the_page_of_predicted_leakage(tmp_path):
  """Written from the files of a run; of its sentences one is computed here."""
  medians = {"none": 41.0, "int4": 22.5, "int2": 14.0}
  images = {k: [v - 1, v, v + 2] for k, v in medians.items()}
  found = {
    "task": "leakage",
    "uplink_bytes_per_client_float32": 1000,
    "defenses": {
      name: {
        "uplink_bytes_per_client": 500,
        "psnr_db_predicted_median": value,
        "psnr_db_predicted_min": min(images[name]),
        "psnr_db_predicted_max": max(images[name]),
      }
      for name, value in medians.items()
    },
    "references": {
      name: {"psnr_db_median": 12.3 if name == "mean_image" else 8.0}
      for name in tables.REFERENCE_NAMES
    },
  }
  (tmp_path / "summary.json").write_text(json.dumps(found))
  settings = dataclasses.asdict(config.make(task="leakage", batch_size=1))
  (tmp_path / "config.json").write_text(json.dumps(settings))
  with open(tmp_path / "leakage.jsonl", "w") as f:
    for name, values in images.items():
      for v in values:
        f.write(json.dumps({"defense": name, "psnr_db_predicted": v}) + "\n")
  text = html.write(tmp_path).read_text()
  assert "under 2 of 3 defences: none, int4." in text
  assert "guess without an update (mean training image) has 12.3" in text
  assert "13.0 to 16.0" in text and "int2: median 14.0 dB" in text
  browser.check(tmp_path / "report.html", tmp_path)
  (tmp_path / "leakage.jsonl").write_text("")
  with pytest.raises(errors.UserError, match="is not of the run"):
    html.write(tmp_path)


@pytest.mark.slow
def test_the_task_finds_a_policy_that_leaks_less_than_uniform_int4(tmp_path):
  def predict(name, **changes):
    return main.run(
      config.make(
        task="leakage",
        output_dir=str(tmp_path / name),
        model="lenet_zhu",
        batch_size=1,
        attack_images="test:0-2",
        **changes,
      )
    )

  first = predict("first", defense=("none", "int4"), guard_bytes=6900)
  found = json.loads((first / "summary.json").read_text())
  lines = (first / "leakage.jsonl").read_text().splitlines()
  assert len(lines) == 2 * 3
  assert "The policy in " in (first / "report.html").read_text()
  none, int4 = (found["defenses"][name] for name in ("none", "int4"))
  assert none["psnr_db_predicted_median"] > 35
  assert found["policy"]["num_bytes"] <= 6900
  assert found["policy"]["relative_error"] <= 0.1
  again = predict("again", defense=(str(first / "policy.toml"),))
  (guarded,) = json.loads((again / "summary.json").read_text())[
    "defenses"
  ].values()
  # On images that the search has not seen.
  gain = int4["psnr_db_predicted_median"] - guarded["psnr_db_predicted_median"]
  assert gain > 1
  assert guarded["uplink_bytes_per_client"] <= 6900


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"batch_size": 2}, "one image and one step"),
    ({"batch_size": 1, "attack": ("dlg",)}, "Expected no --attack"),
    ({"batch_size": 1, "defense": ("he",)}, "nothing to predict"),
  ],
)
def test_what_cannot_be_predicted_is_said_in_one_line(changes, words, tmp_path):
  values = {"task": "leakage", "output_dir": str(tmp_path / "run"), **changes}
  with pytest.raises(errors.UserError, match=words):
    main.run(config.make(**values))
  assert not (tmp_path / "run").exists()
