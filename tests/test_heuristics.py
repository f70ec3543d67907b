"""Mixup, Soteria, clipping alone: what they do, and what gives them away."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from mpqfl_jax import (
  attacks,
  defenses,
  errors,
  federated,
  heuristics,
  local,
  models,
  types,
)
from tests.test_attacks import psnr, small_model

MODEL = small_model()
KERNEL = ("dense2", "kernel")


def _examples(n=4):
  rng = np.random.default_rng(5)
  return types.Examples(
    jnp.asarray(rng.integers(0, 256, (n, *MODEL.image_shape)), jnp.uint8),
    jnp.asarray(rng.integers(0, MODEL.num_classes, n), jnp.int32),
    jnp.arange(n, dtype=jnp.int32),
  )


def _params():
  return MODEL.init(jax.random.key(3))


def _assert_close(a, b, **tolerance):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def _sent(spec, examples, batch, rate=0.3):
  """What a client sends under a defence, and the observation of it."""
  params = _params()
  defense = defenses.make(spec, params)
  size = len(examples.y)
  schedule = local.Schedule(batch, size)
  client = federated.client(
    local.sgd(
      MODEL,
      optax.sgd,
      schedule,
      gradient=None if defense.gradient is None else defense.gradient(MODEL),
    ),
    defense.transform,
    defense.codec,
  )
  round_key = jax.random.key(11)
  sent = federated.Broadcast(params, (), jnp.float32(rate))
  who = types.Cohort(jnp.int32(0), jnp.int32(0), jnp.int32(size))
  out = jax.jit(client.turn)(
    sent, examples, who, client.init(params), round_key
  )
  batches = federated.client_keys(round_key, 0).batches
  rows, _ = schedule.rows(
    batches, jnp.int32(0), jnp.int32(size), examples.order, -(-size // batch)
  )
  return defense, out, rows, batches


def test_sensitivity_is_that_of_the_whole_jacobian():
  params = _params()
  x = jax.random.uniform(jax.random.key(0), (3, *MODEL.image_shape))
  mean, std = MODEL.mean, MODEL.std

  def features(image):
    first = params["dense1"]
    z = ((image - mean) / std).reshape(-1)
    return jax.nn.sigmoid(z @ first["kernel"] + first["bias"])

  for image, got in zip(
    x, heuristics.sensitivity(MODEL, params, x), strict=True
  ):
    jacobian = np.asarray(jax.jacfwd(features)(image)).reshape(24, -1)
    want = np.linalg.norm(jacobian, axis=1) / np.abs(features(image))
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_a_dead_feature_is_not_worth_withholding():
  net = models.make("mlp", (6, 6, 1), 4, MODEL.mean, MODEL.std)
  params = net.init(jax.random.key(0))
  params["dense2"]["bias"] = params["dense2"]["bias"].at[7].set(-100.0)
  x = jax.random.uniform(jax.random.key(1), (1, 6, 6, 1))
  score = heuristics.sensitivity(net, params, x)[0]
  assert np.isinf(score[7])
  assert not heuristics.withheld_features(score, 0.3)[7]


@pytest.mark.parametrize(
  ("ratio", "count"), [(0.5, 3), (0.01, 1), (0.99, 5), (0.34, 2)]
)
def test_the_smallest_scores_are_withheld(ratio, count):
  score = jnp.array([0.3, 0.1, jnp.inf, 0.2, 5.0, 0.0])
  hidden = np.asarray(heuristics.withheld_features(score, ratio))
  np.testing.assert_array_equal(
    np.flatnonzero(hidden), np.sort(np.argsort(score)[:count])
  )


def test_soteria_hides_rows_of_the_last_kernel_and_nothing_else():
  examples = _examples()
  _, plain, _, _ = _sent("none", examples, batch=4)
  _, out, _, _ = _sent("soteria(ratio=0.25)", examples, batch=4)
  hidden = np.all(np.asarray(out.update["dense2"]["kernel"]) == 0, axis=1)
  x = local.images(examples, examples.order)
  score = jnp.sum(heuristics.sensitivity(MODEL, _params(), x), 0)
  np.testing.assert_array_equal(
    hidden, heuristics.withheld_features(score, 0.25)
  )
  want = plain.update
  want["dense2"]["kernel"] = jnp.where(
    hidden[:, None], 0.0, want["dense2"]["kernel"]
  )
  _assert_close(out.update, want, rtol=1e-5, atol=1e-7)


def test_an_attacker_who_knows_soteria_leaves_the_hidden_rows_out():
  defense, out, _, _ = _sent("soteria", _examples(1), batch=1)
  known = defenses.bins(defense, out.payload)
  sent = np.asarray(out.update["dense2"]["kernel"])
  hidden = np.all(sent == 0, axis=1)
  assert hidden.sum() == 12
  assert np.all(np.isinf(known.lower["dense2"]["kernel"][hidden]))
  assert np.all(np.isinf(known.upper["dense2"]["kernel"][hidden]))
  mean_square = np.mean(sent**2)
  assert np.all(known.variance["dense2"]["kernel"][hidden] > 1e5 * mean_square)
  np.testing.assert_array_equal(
    known.lower["dense2"]["kernel"][~hidden], sent[~hidden]
  )
  np.testing.assert_array_equal(
    known.lower["dense1"]["kernel"], out.update["dense1"]["kernel"]
  )


def test_soteria_stops_who_does_not_know_it_and_nobody_else():
  examples = _examples(1)
  defense, out, rows, _ = _sent("soteria(ratio=0.8)", examples, batch=1)
  truth = np.asarray(local.images(examples, rows[0]))
  attack = attacks.make("dlg", MODEL, iterations=600)
  found = {}
  for knowledge, bins in {
    "blind": None,
    "adaptive": defenses.bins(defense, out.payload),
  }.items():
    seen = types.Observation(
      _params(), out.update, bins, examples.y[None], jnp.float32(0.3)
    )
    seen = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], seen)
    got = attacks.run(attack, seen, jax.random.key(0), progress=False)
    found[knowledge] = psnr(got.x[0], truth)[0]
  assert found["adaptive"] > 40
  assert found["blind"] < found["adaptive"] - 15


def test_mixup_is_the_mean_loss_of_the_mixed_batch():
  params, examples = _params(), _examples(5)
  rows, mask = jnp.array([3, 1, 4, 0]), jnp.array([1.0, 1.0, 1.0, 0.0])
  key = jax.random.key(8)
  mixing = heuristics.mixup(alpha=0.4)
  loss, got = heuristics.mixed_gradient(MODEL, mixing)(
    params, examples, rows, mask, jnp.sum(mask), key
  )
  w = float(mixing.weight(key))
  assert 0.5 <= w <= 1
  x = np.asarray(examples.x, np.float32) / 255
  y = np.eye(MODEL.num_classes, dtype=np.float32)[np.asarray(examples.y)]

  def mean_loss(params):
    total = 0.0
    for own, other in ((3, 1), (1, 4), (4, 3)):
      image = w * x[own] + (1 - w) * x[other]
      label = w * y[own] + (1 - w) * y[other]
      logits = jax.nn.log_softmax(MODEL.apply(params, image[None]))[0]
      total -= logits @ label
    return total / 3

  want_loss, want = jax.value_and_grad(mean_loss)(params)
  np.testing.assert_allclose(loss, want_loss, rtol=1e-5)
  _assert_close(got, want, rtol=2e-4, atol=1e-6)


def test_one_image_alone_is_not_mixed():
  examples = _examples(1)
  _, plain, _, _ = _sent("none", examples, batch=1)
  _, mixed, _, _ = _sent("mixup", examples, batch=1)
  _assert_close(plain.update, mixed.update, rtol=1e-5, atol=1e-7)


def test_mixups_weight_is_drawn_anew_in_each_step_with_its_law():
  mixing = heuristics.mixup(alpha=1.0)
  weights = np.asarray(mixing.weights(jax.random.key(1), 2_000))
  # Uniform on [1/2, 1]: a false alarm once in 1,000 seeds.
  assert stats.kstest(weights, stats.uniform(0.5, 0.5).cdf).pvalue > 1e-3


@pytest.mark.parametrize("batch", [4, 2])
def test_the_attackers_model_of_mixup_is_what_a_client_does(batch):
  examples = _examples(4)
  defense, out, rows, batches = _sent("mixup", examples, batch)
  assert defense.mixup is not None
  update = attacks.simulate(
    MODEL,
    _params(),
    local.images(examples, rows),
    examples.y[rows],
    0.3,
    mixing=defense.mixup.weights(batches, len(rows)),
  )
  _assert_close(update, out.update, rtol=2e-4, atol=1e-6)


def test_mixup_hides_images_from_who_does_not_know_the_weight():
  examples = _examples(2)
  defense, out, rows, batches = _sent("mixup", examples, batch=2)
  assert defense.mixup is not None
  truth = np.asarray(local.images(examples, rows[0]))
  attack = attacks.make("dlg", MODEL, batch=2, iterations=1500)
  found = {}
  for knowledge, mixing in {
    "blind": None,
    "adaptive": defense.mixup.weights(batches, 1),
  }.items():
    seen = types.Observation(
      _params(),
      out.update,
      None,
      examples.y[rows],
      jnp.float32(0.3),
      mixing=mixing,
    )
    seen = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], seen)
    got = attacks.run(attack, seen, jax.random.key(0), progress=False)
    found[knowledge] = np.min(psnr(got.x[0], truth))
  assert found["adaptive"] > found["blind"] + 8


def test_clip_alone_scales_and_proves_nothing():
  examples = _examples()
  _, plain, _, _ = _sent("none", examples, batch=4)
  defense, out, _, _ = _sent("clip(norm=0.01)", examples, batch=4)
  assert defense.guarantee is None
  flat = np.concatenate([np.ravel(u) for u in jax.tree.leaves(plain.update)])
  _assert_close(
    out.update,
    jax.tree.map(lambda u: 0.01 / np.linalg.norm(flat) * u, plain.update),
    rtol=1e-4,
  )
  np.testing.assert_allclose(
    defenses.clips(defense, 0.3, True), [np.inf, 0.01], rtol=1e-6
  )


@pytest.mark.parametrize(
  ("spec", "words"),
  [
    ("soteria(ratio=1)", "between 0 and 1"),
    ("soteria(ratio=0)", "between 0 and 1"),
    ("mixup(alpha=0)", "alpha"),
    ("clip(norm=-1)", "clip"),
    ("mixup(beta=1)", "alpha"),
  ],
)
def test_settings_without_meaning_are_refused(spec, words):
  with pytest.raises(errors.UserError, match=words):
    defenses.make(spec, _params())


def test_soteria_needs_a_last_dense_layer():
  with pytest.raises(errors.UserError, match="no last dense layer"):
    defenses.make("soteria", {"conv1": {"kernel": jnp.zeros((3, 3, 1, 4))}})
