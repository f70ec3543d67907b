"""A malicious server's module: what it shows, and what it does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import config, main
from mpqfl_jax import attacks, errors, metrics, models, precision
from mpqfl_jax.attacks import imprint
from mpqfl_jax.types import Observation

MEAN, STD = np.array([0.4], np.float32), np.array([0.3], np.float32)
SHAPE = (6, 6, 1)


def draw(n, seed):
  """Images of very different brightness."""
  rng = np.random.default_rng(seed)
  x = rng.uniform(size=(n, *SHAPE)) * rng.uniform(size=(n, 1, 1, 1))
  return np.uint8(255 * x)


def implanted(bins):
  base = models.make("mlp", SHAPE, 4, MEAN, STD)
  model = imprint.implant(base, bins, draw(500, 0))
  return model, model.init(jax.random.key(0))


def send(model, params, x, codec=None):
  y = jnp.arange(len(x))[None] % 4
  update = attacks.simulate(model, params, x[None], y, 0.1)
  bins = None
  if codec is not None:
    payload, _ = codec.encode(jax.random.key(0), update, codec.init(params))
    update, bins = codec.decode(payload), codec.bins(payload)
  seen = Observation(params, update, bins, y, jnp.float32(0.1))
  return jax.tree.map(lambda a: np.asarray(a)[None], seen)


def test_images_alone_in_their_bin_are_exact_and_no_others():
  bins, n = 32, 24
  model, params = implanted(bins)
  x = draw(n, 1) / np.float32(255)
  # By brute force: which image is alone between two thresholds.
  brightness = ((x - MEAN) / STD).reshape(n, -1).mean(1)
  thresholds = -np.asarray(params["imprint1"]["bias"])
  where = np.searchsorted(thresholds, brightness) - 1
  alone = np.bincount(where, minlength=bins)[where] == 1
  assert 5 < alone.sum() < n
  attack = attacks.make("imprint", model, batch=n, bins=bins)
  found = attacks.run(
    attack, send(model, params, x), jax.random.key(0), progress=False
  )
  quality = metrics.psnr_db(x[:, None], found.x[0][None]).max(1)
  np.testing.assert_array_equal(quality > 50, alone)


def test_model_behaves_much_as_before():
  base = models.make("mlp", SHAPE, 4, MEAN, STD)
  model, params = implanted(64)
  x = draw(50, 2) / np.float32(255)
  before, after = base.apply(params, x), model.apply(params, x)
  assert np.corrcoef(np.ravel(before), np.ravel(after))[0, 1] > 0.9


def test_rounded_differences_are_left_out_by_who_knows_the_codec():
  model, params = implanted(32)
  x = draw(6, 3) / np.float32(255)
  seen = send(model, params, x, precision.make("int4", params))
  attack = attacks.make("imprint", model, batch=6, bins=32)
  key = jax.random.key(0)
  adaptive = attacks.run(attack, seen, key, progress=False)
  blind = attacks.run(attack, seen._replace(bins=None), key, progress=False)
  # What is nothing but rounding stays grey.
  grey = lambda found: np.all(found.x[0] == 0.5, (1, 2, 3)).sum()  # noqa: E731
  assert grey(adaptive) > grey(blind)


def test_what_it_cannot_do_is_refused():
  base = models.make("mlp", SHAPE, 4, MEAN, STD)
  model, params = implanted(32)
  seen = send(model, params, draw(2, 4) / np.float32(255))
  key = jax.random.key(0)
  with pytest.raises(errors.UserError, match="bins=1"):
    imprint.implant(base, 1, draw(10, 0))
  with pytest.raises(errors.UserError, match="one step"):
    attacks.make("imprint", model, steps=2)
  with pytest.raises(errors.UserError, match="64 bins"):
    attacks.run(attacks.make("imprint", model, batch=2, bins=64), seen, key)


@pytest.mark.parametrize(
  "flags",
  [{"task": "train"}, {"task": "attack", "attack": ("imprint", "dlg")}],
)
def test_it_runs_alone_and_without_training(flags):
  with pytest.raises(errors.UserError, match="alone"):
    config.make(**{"attack": ("imprint",), **flags})


def test_results_say_that_the_server_is_malicious(tmp_path):
  run = config.make(
    task="attack",
    attack=("imprint(bins=64)",),
    attack_images="test:0-7",
    batch_size=8,
    model="mlp",
    client_lr=0.1,
    output_dir=str(tmp_path / "run"),
  )
  main.run(run)
  lines = (tmp_path / "run" / "attacks.jsonl").read_text()
  assert lines.count('"threat": "malicious_server"') == 8
  assert "malicious server" in (tmp_path / "run" / "report.html").read_text()
