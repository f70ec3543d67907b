"""Attacks on a part of the update, and rounding that gradients pass through."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpqfl_jax import attacks, errors, models, policy, precision, trees, types
from mpqfl_jax.attacks import focus, objectives
from tests.test_experiments import execute

RATE = jnp.float32(0.5)
# Nine values an image, for trees of no model in particular.
NINE = models.make("mlp", (3, 3, 1), 3, np.zeros(1), np.ones(1))
ONE = attacks.Work()


def tree(seed):
  rng = np.random.default_rng(seed)
  return {
    "conv1": {"bias": rng.normal(size=3), "kernel": rng.normal(size=(2, 3))},
    "dense1": {"bias": rng.normal(size=2), "kernel": rng.normal(size=(3, 2))},
  }


def bins(v, half, stochastic):
  return types.Bins(
    jax.tree.map(lambda a: a - half, v),
    jax.tree.map(lambda a: a + half, v),
    jax.tree.map(lambda a: np.full_like(a, half**2 / 3), v),
    jax.tree.map(lambda a: stochastic, v),
  )


def observed(v, known=None):
  return types.Observation({}, v, known, None, RATE)


OBJECTIVES = {
  **objectives.OBJECTIVES,
  "log_likelihood": lambda u, o: objectives.log_likelihood(u, o, 0.3),
}


@pytest.mark.parametrize("knowledge", ["blind", "nearest", "stochastic"])
@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_one_layer_is_compared_as_if_it_were_the_update(name, knowledge):
  """Against the objective of trees that have no other layer."""
  fn, u, v = OBJECTIVES[name], tree(0), tree(1)
  known = (
    None if knowledge == "blind" else bins(v, 0.4, knowledge == "stochastic")
  )
  whole = observed(v, known)

  def part(t):
    return {"conv1": t["conv1"]}

  alone = observed(
    part(v), None if known is None else types.Bins(*map(part, known))
  )
  got, gradient = jax.value_and_grad(fn)(
    u, focus.focused("conv1", whole, NINE, ONE)
  )
  want, slope = jax.value_and_grad(fn)(part(u), alone)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  for a, b in zip(
    jax.tree.leaves(gradient["conv1"]), jax.tree.leaves(slope), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
  assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(gradient["dense1"]))
  assert abs(fn(u, whole) - want) > 1e-3


@pytest.mark.parametrize(
  "pattern, kept",
  [
    ("conv*", ["conv1/bias", "conv1/kernel"]),
    ("*/bias", ["conv1/bias", "dense1/bias"]),
    ("dense1/kernel", ["dense1/kernel"]),
  ],
)
def test_patterns_are_those_of_policies(pattern, kept):
  whole = observed(tree(0))
  assert focus.focused("*", whole, NINE, ONE) is whole
  assert leaves_in_focus(focus.focused(pattern, whole, NINE, ONE)) == kept


def leaves_in_focus(observation):
  names = trees.leaf_names(observation.focus)
  found = jax.tree.leaves(observation.focus)
  return [name for name, k in zip(names, found, strict=True) if k]


def test_bits_are_the_capacity_of_what_can_count():
  """Of noise that is added to numbers which the test knows."""
  rng = np.random.default_rng(4)
  sizes = {"conv1/kernel": (300, 40), "dense1/kernel": (200, 300)}
  signal, noise = {"conv1": 2.0, "dense1": 1.0}, {"conv1": 2.0, "dense1": 0.5}
  v: dict = {}
  variance: dict = {}
  for name, shape in sizes.items():
    layer, leaf = name.split("/")
    # A convolution's kernel has four axes.
    shape = (1, 1, *shape) if layer == "conv1" else shape
    sent = rng.normal(size=shape) * signal[layer]
    v[layer] = {leaf: sent + rng.normal(size=shape) * noise[layer]}
    variance[layer] = {leaf: np.full(shape, noise[layer] ** 2)}
  # Nothing is said of three quarters of the convolution's entries.
  variance["conv1"]["kernel"][..., 10:] = np.inf
  known = bins(v, 1.0, False)._replace(variance=variance)

  def capacity(layer, entries):
    ratio = (signal[layer] / noise[layer]) ** 2
    return entries * 0.5 * np.log2(1 + ratio)

  def said(side, images):
    model = models.make("mlp", (side, side, 1), 3, np.zeros(1), np.ones(1))
    return focus.bits(v, known, model, attacks.Work(1, images))

  # 100 values are searched for, then 10,000, of two images 20,000.
  for side, images, conv, dense in (
    (10, 1, 100, 100),
    (100, 1, 3000, 500),
    (100, 2, 3000, 1000),
  ):
    found = said(side, images)
    np.testing.assert_allclose(
      found["conv1"], capacity("conv1", conv), rtol=0.1
    )
    np.testing.assert_allclose(
      found["dense1"], capacity("dense1", dense), rtol=0.05
    )


def test_zeros_and_noise_say_nothing():
  v = jax.tree.map(jnp.zeros_like, tree(0))
  dead = bins(v, 0.0, False)
  assert all(b == 0 for b in focus.bits(v, dead, NINE, ONE).values())
  rng = np.random.default_rng(0)
  v = {"conv1": {"kernel": rng.normal(size=(1, 1, 50, 60))}}
  noise = bins(v, np.sqrt(3.0), False)  # variance 1, of the same size
  assert focus.bits(v, noise, NINE, ONE)["conv1"] < 0.1 * 9


def test_a_layer_of_zeros_does_no_harm_to_another():
  """Not even where it is exactly known, and masked."""
  v = tree(1) | {"dense1": jax.tree.map(np.zeros_like, tree(1)["dense1"])}
  known = bins(v, 0.0, False)
  for name, fn in OBJECTIVES.items():
    seen = focus.focused("conv1", observed(v, known), NINE, ONE)
    value, gradient = jax.value_and_grad(fn)(tree(0), seen)
    assert np.isfinite(value), name
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
  "rules, best",
  [
    ({"conv1": "int8", "conv2": "int6", "*": "int2"}, "conv2"),
    ({"conv3": "float16", "*": "int4"}, "conv3"),
    # Of many coarse entries those beyond the number of pixels do not count.
    ({"dense1": "int4", "conv2": "int6", "*": "int2"}, "conv2"),
    # Too few fine ones do not make up for their number.
    ({"conv1": "int6", "*": "int4"}, "conv2"),
    # Layers that say as much as one another: the first.
    ({"*": "float32"}, "conv2"),
  ],
)
def test_the_least_protected_layer_is_found(rules, best):
  model = models.make(
    "lenet_zhu", (32, 32, 3), 10, np.full(3, 0.5), np.full(3, 0.25)
  )
  params = model.init(jax.random.key(0))
  codec = precision.from_rules(
    "test", [policy.QuantRule(p, name) for p, name in rules.items()], params
  )
  x = jax.random.uniform(jax.random.key(1), (1, 1, 32, 32, 3))
  update = attacks.simulate(model, params, x, jnp.zeros((1, 1), int), RATE)
  payload, _ = codec.encode(jax.random.key(2), update, codec.init(params))
  seen = observed(codec.decode(payload), codec.bins(payload))

  def found(update, bins):
    seen = observed(update, bins)
    return focus.focused(focus.LEAST_PROTECTED, seen, model, ONE)

  kept = leaves_in_focus(found(seen.update, seen.bins))
  assert {policy.layer_of(name) for name in kept} == {best}
  # Compiled, too, where the last bits of a sum are others.
  compiled = jax.jit(lambda u, b: found(u, b).focus)(seen.update, seen.bins)
  assert leaves_in_focus(seen._replace(focus=compiled)) == kept


@pytest.mark.parametrize(
  "name, settings",
  [
    ("int4", {}),
    ("int4", {"mode": "affine"}),
    ("int2", {}),
  ],
)
def test_rounding_that_gradients_pass_through_is_the_codecs(name, settings):
  """The candidate is rounded as the codec itself would round it."""
  model = models.make("mlp", (4, 4, 1), 3, np.zeros(1), np.ones(1))
  params = model.init(jax.random.key(0))
  codec = precision.make(name, params, **settings)
  rng = np.random.default_rng(0)
  v = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape)), params)

  def moved(a):
    """Of the same range, hence on the same grid."""
    low, high = jnp.min(a), jnp.max(a)
    fixed = (a == low) | (a == high)
    most = jnp.minimum(jnp.abs(low), jnp.abs(high))
    near = jnp.clip(a + 0.3 * rng.normal(size=a.shape), -most, most)
    return jnp.where(fixed, a, near)

  u = jax.tree.map(moved, v)

  def sent(tree):
    payload, _ = codec.encode(jax.random.key(0), tree, codec.init(params))
    return codec.decode(payload), codec.bins(payload)

  (seen, known), (decoded, _) = sent(v), sent(u)
  observation = observed(seen, known)
  apart = trees.subtract(decoded, seen)
  weights = objectives.weights(observation)

  def weighted(a, b):
    return trees.vdot(objectives.trees_multiply(a, weights), b)

  scale = weighted(seen, seen)
  value, gradient = jax.value_and_grad(objectives.straight_through)(
    u, observation
  )
  np.testing.assert_allclose(value, weighted(apart, apart) / scale, rtol=1e-4)
  for g, w, r in zip(
    *map(jax.tree.leaves, (gradient, weights, apart)), strict=True
  ):
    np.testing.assert_allclose(g, 2 * w * r / scale, rtol=1e-3, atol=1e-6)
  assert value > 0
  assert objectives.straight_through(v, observation) == 0


SEARCHES = {
  "dlg": {},
  "idlg": {},
  "inverting_gradients": {},
  "tag": {},
  "gradinversion": {"members": 2},
  "deep_image_prior": {"width": 8},
  "map": {"stages": 2},
}


@pytest.mark.parametrize("name", SEARCHES)
def test_every_search_looks_only_where_it_is_told_to(name):
  """What is changed elsewhere changes nothing, what is changed there does."""
  rng = np.random.default_rng(1)
  model = models.make("mlp", (4, 4, 1), 3, np.zeros(1), np.ones(1))
  params = model.init(jax.random.key(0))
  x = jnp.asarray(rng.uniform(size=(1, 1, 4, 4, 1)), jnp.float32)
  y = jnp.ones((1, 1), int)
  update = attacks.simulate(model, params, x, y, RATE)
  auxiliary = rng.integers(0, 256, (100, 4, 4, 1)).astype(np.uint8)
  attack = attacks.make(
    name,
    model,
    iterations=6,
    layers="dense1",
    auxiliary=auxiliary,
    **SEARCHES[name],
  )

  def found(**changed):
    seen = types.Observation(params, update | changed, None, y, RATE)
    batch = jax.tree.map(lambda a: np.asarray(a)[None], seen)
    return attacks.run(attack, batch, jax.random.key(0), progress=False).x

  def other(layer):
    return jax.tree.map(lambda a: a * 3 + 0.01, update[layer])

  whole = found()
  np.testing.assert_array_equal(found(dense2=other("dense2")), whole)
  assert np.any(found(dense1=other("dense1")) != whole)
  with pytest.raises(errors.UserError, match="no layer"):
    layered = attacks.make(
      name, model, layers="conv9", auxiliary=auxiliary, **SEARCHES[name]
    )
    layered.check(types.Observation(params, update, None, y, RATE))


def test_a_blind_search_of_the_finest_layer_beats_one_of_all():
  """A mixed policy hides from DLG only while it looks at every layer."""
  rng = np.random.default_rng(3)
  model = models.make(
    "lenet_zhu",
    (16, 16, 1),
    10,
    np.full(1, 0.5, np.float32),
    np.full(1, 0.25, np.float32),
    conv="slices",
  )
  params = model.init(jax.random.key(0))
  codec = precision.from_rules(
    "test",
    [policy.QuantRule("conv2", "float16"), policy.QuantRule("*", "int2")],
    params,
  )
  x = rng.uniform(size=(1, 16, 16, 1)).astype(np.float32)
  y = jnp.array([[3]])
  update = attacks.simulate(model, params, jnp.asarray(x)[None], y, RATE)
  payload, _ = codec.encode(jax.random.key(2), update, codec.init(params))
  seen = types.Observation(params, codec.decode(payload), None, y, RATE)
  batch = jax.tree.map(lambda a: np.asarray(a)[None], seen)

  def error(**settings):
    attack = attacks.make("dlg", model, iterations=150, **settings)
    found = attacks.run(attack, batch, jax.random.key(0), progress=False)
    return np.mean((found.x[0] - x) ** 2)

  assert error(layers="conv2") < 0.1 * error()


def test_layers_that_cannot_be_chosen_are_refused():
  blind, knowing = observed(tree(0)), observed(tree(0), bins(tree(0), 1, False))
  focus.check(focus.LEAST_PROTECTED, knowing)
  focus.check("conv*", blind)
  with pytest.raises(errors.UserError, match="adaptive"):
    focus.check(focus.LEAST_PROTECTED, blind)
  with pytest.raises(errors.UserError, match=r"no layer.*conv1, dense1"):
    focus.check("conv2", knowing)


def test_a_run_is_refused_before_it_begins(tmp_path, capsys):
  run = tmp_path / "run"
  status = execute(
    "--task=attack",
    "--dataset=mnist_sample",
    "--batch_size=1",
    "--attack=dlg(iterations=2,layers=least_protected)",
    "--attack_knowledge=blind,adaptive",
    f"--output_dir={run}",
  )
  assert status == 2 and not run.exists()
  assert "blind adversary does not know" in capsys.readouterr().err
