"""Attacks on a part of the update, and rounding that gradients pass through."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpqfl_jax import attacks, errors, models, policy, precision, trees, types
from mpqfl_jax.attacks import focus, objectives

RATE = jnp.float32(0.5)


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
  got, gradient = jax.value_and_grad(fn)(u, focus.focused("conv1", whole, 9))
  want, slope = jax.value_and_grad(fn)(part(u), alone)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  for a, b in zip(
    jax.tree.leaves(gradient["conv1"]), jax.tree.leaves(slope), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
  assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(gradient["dense1"]))
  assert abs(fn(u, whole) - want) > 1e-3


def test_patterns_are_those_of_policies():
  whole = observed(tree(0))
  assert focus.focused("*", whole, 9) is whole
  for pattern in ("conv*", "*/bias", "dense1/kernel"):
    found = focus.focused(pattern, whole, 9).focus
    assert [bool(k) for k in jax.tree.leaves(found)] == [
      policy.matches(pattern, name) for name in trees.leaf_names(found)
    ]


def test_bits_are_the_capacity_of_what_can_count():
  v = tree(0)
  noise = {"conv1": 0.1, "dense1": 0.01}
  variance = {
    layer: jax.tree.map(lambda a, n=n: np.full_like(a, n**2), v[layer])
    for layer, n in noise.items()
  }
  # Nothing is said of one entry, and one is known as well as a float32 can be.
  variance["conv1"]["bias"][0] = np.inf
  variance["dense1"]["kernel"][0, 0] = 0.0
  known = bins(v, 1.0, False)._replace(variance=variance)

  def capacity(layer):
    each = []
    for name, leaf in v[layer].items():
      signal = np.mean(leaf**2)
      each += [
        0.5 * np.log2(1 + signal / max(n, signal * 4.0**-24))
        for n in variance[layer][name].reshape(-1)
      ]
    return np.array(each)

  for unknowns in (4, 100):
    found = focus.bits(v, known, unknowns)
    assert list(found) == ["conv1", "dense1"]
    for layer, value in found.items():
      each = capacity(layer)
      want = each.mean() * min(len(each), unknowns)
      np.testing.assert_allclose(value, want, rtol=1e-4)


@pytest.mark.parametrize(
  "rules, best",
  [
    ({"conv1": "int8", "conv2": "int6", "*": "int2"}, "conv2"),
    ({"conv3": "float16", "*": "int4"}, "conv3"),
    # Of many coarse entries those beyond the number of pixels do not count.
    ({"dense1": "int4", "conv2": "int6", "*": "int2"}, "conv2"),
    # Too few fine ones do not make up for their number.
    ({"conv1": "int6", "*": "int4"}, None),
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
  found = focus.focused(focus.LEAST_PROTECTED, seen, 3072).focus
  kept = {
    policy.layer_of(name)
    for name, k in zip(
      trees.leaf_names(found), jax.tree.leaves(found), strict=True
    )
    if k
  }
  assert len(kept) == 1
  assert kept == {best} if best else kept != {"conv1"}


def test_rounding_that_gradients_pass_through_is_the_codecs():
  """The candidate is rounded as the codec itself would round it."""
  model = models.make("mlp", (4, 4, 1), 3, np.zeros(1), np.ones(1))
  params = model.init(jax.random.key(0))
  codec = precision.make("int4", params)
  rng = np.random.default_rng(0)
  v = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape)), params)
  # Of the same largest entry, hence on the same grid.
  u = jax.tree.map(
    lambda a: jnp.where(
      jnp.abs(a) == jnp.max(jnp.abs(a)),
      a,
      jnp.clip(
        a + 0.3 * rng.normal(size=a.shape),
        -jnp.max(jnp.abs(a)),
        jnp.max(jnp.abs(a)),
      ),
    ),
    v,
  )

  def sent(tree):
    payload, _ = codec.encode(jax.random.key(0), tree, codec.init(params))
    return codec.decode(payload), codec.bins(payload)

  (seen, known), (decoded, _) = sent(v), sent(u)
  observation = observed(seen, known)
  inside = jax.tree.map(
    lambda low, high: np.isfinite(low) & np.isfinite(high),
    known.lower,
    known.upper,
  )
  weights = objectives.weights(observation)

  def weighted(a, b):
    return sum(
      np.sum(np.where(i, w * x * y, 0))
      for i, w, x, y in zip(
        *map(jax.tree.leaves, (inside, weights, a, b)), strict=True
      )
    )

  apart = trees.subtract(decoded, seen)
  scale = sum(
    np.sum(w * x * x)
    for w, x in zip(
      jax.tree.leaves(weights), jax.tree.leaves(seen), strict=True
    )
  )
  value, gradient = jax.value_and_grad(objectives.straight_through)(
    u, observation
  )
  np.testing.assert_allclose(value, weighted(apart, apart) / scale, rtol=1e-4)
  for i, g, w, r in zip(
    *map(jax.tree.leaves, (inside, gradient, weights, apart)), strict=True
  ):
    np.testing.assert_allclose(
      np.where(i, g, 0), np.where(i, 2 * w * r / scale, 0), rtol=1e-3, atol=1e-7
    )
  assert value > 0
  assert objectives.straight_through(v, observation) == 0


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
