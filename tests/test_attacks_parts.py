"""Objectives, optimiser, coordinates, labels and predicted leakage."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft
import scipy.optimize
import scipy.stats

from mpqfl_jax import (
  datasets,
  defenses,
  errors,
  metrics,
  models,
  precision,
  transforms,
  trees,
  types,
)
from mpqfl_jax.attacks import (
  coordinates,
  core,
  labels,
  lbfgs,
  leakage,
  objectives,
)

MEAN, STD = np.array([0.4, 0.5, 0.6], np.float32), np.full(3, 0.25, np.float32)


def rgb_model(side=4, classes=3):
  shape = (side, side, 3)
  return models.make("mlp", shape, classes, MEAN, STD, conv="slices")


def seen(update, bins=None):
  return types.Observation({}, update, bins, None, jnp.float32(1))


def around(v, half, stochastic=False):
  """Bins of half-width `half` around the leaves of v."""
  return types.Bins(
    jax.tree.map(lambda a: a - half, v),
    jax.tree.map(lambda a: a + half, v),
    jax.tree.map(lambda a: jnp.full_like(a, half**2 / 3), v),
    jax.tree.map(lambda a: jnp.bool_(stochastic), v),
  )


def two_leaves(seed=0):
  rng = np.random.default_rng(seed)
  return {
    "a": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32),
    "b": jnp.asarray(rng.normal(size=4), jnp.float32),
  }


def test_absolute_distance_counts_first_layers_most():
  v = {"a": jnp.array([2.0, -1.0]), "b": jnp.array([4.0])}
  u = {"a": jnp.array([2.5, -1.0]), "b": jnp.array([3.0])}
  # Two layers: weights 1 and 1/2 on |0.5| and |1|, over 3 and 4.
  absolute = (0.5 + 0.5 * 1) / (3 + 0.5 * 4)
  want = (0.25 + 1) / (4 + 1 + 16) + 0.1 * absolute
  got = objectives.squared_and_absolute(u, seen(v))
  np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize(
  "clips", [(np.inf, 0.5), (1.0, np.inf), (9.0, 9.0), (np.inf, np.inf)]
)
def test_an_adversary_who_knows_the_clip_explains_the_update(clips):
  truth = two_leaves(0)
  sent, _ = transforms.clip_to(truth, clips[0], order=1)
  sent, _ = transforms.clip_to(sent, clips[1], order=2)
  blind, knowing = (
    types.Observation({}, sent, None, None, jnp.float32(1), clips=known)
    for known in (None, jnp.asarray(clips, jnp.float32))
  )
  assert objectives.squared(truth, knowing) < 1e-10
  assert abs(objectives.cosine(truth, knowing)) < 1e-6
  likely, unlikely = (
    objectives.log_likelihood(truth, o, 0.1) for o in (knowing, blind)
  )
  if min(clips) < 9.0:
    assert objectives.squared(truth, blind) > 0.1
    assert likely > unlikely + 1
  # A candidate that was not clipped is compared as it is.
  little = jax.tree.map(lambda leaf: 0.01 * leaf, truth)
  np.testing.assert_allclose(
    objectives.squared(little, knowing), objectives.squared(little, blind)
  )
  gradient = jax.grad(objectives.squared)(two_leaves(1), knowing)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
  "name, knowledge",
  [
    (name, knowledge)
    for name in [*sorted(objectives.OBJECTIVES), "log_likelihood"]
    for knowledge in ("blind", "nearest", "stochastic")
    # Its gradient is not that of its value, on purpose (`test_focus`).
    if (name, knowledge) != ("straight_through", "nearest")
  ],
)
def test_gradients_equal_finite_differences(name, knowledge):
  v, u = two_leaves(0), two_leaves(1)
  bins = None
  if knowledge != "blind":
    bins = around(v, 0.4, stochastic=knowledge == "stochastic")
  observation = seen(v, bins)
  if name == "log_likelihood":
    fn = lambda u: objectives.log_likelihood(u, observation, 0.3)  # noqa: E731
  else:
    fn = lambda u: objectives.OBJECTIVES[name](u, observation)  # noqa: E731
  gradient = jax.grad(fn)(u)
  if name == "cosine" and knowledge != "blind":
    # Its target moves with the candidate and is held fixed on purpose: at the
    # bins' own centre the gradient vanishes.
    inside = jax.grad(fn)(jax.tree.map(lambda a: 1.0 * a, v))
    assert all(jnp.all(jnp.abs(g) < 1e-5) for g in jax.tree.leaves(inside))
    return
  h = 1e-2
  for leaf in u:
    for i in np.ndindex(u[leaf].shape):
      up = {**u, leaf: u[leaf].at[i].add(h)}
      down = {**u, leaf: u[leaf].at[i].add(-h)}
      numeric = (fn(up) - fn(down)) / (2 * h)
      np.testing.assert_allclose(gradient[leaf][i], numeric, atol=3e-2)


def test_an_interval_costs_nothing_inside():
  v = two_leaves()
  observation = seen(v, around(v, 0.5))
  inside = jax.tree.map(lambda a: a + 0.49, v)
  assert objectives.squared(inside, observation) == 0
  outside = jax.tree.map(lambda a: a + 0.6, v)
  assert objectives.squared(outside, observation) > 0


def test_stochastic_likelihood_is_the_probability_of_the_draw():
  v = {"a": jnp.zeros(5)}
  u = {"a": jnp.array([0.0, 0.1, -0.3, 0.5, 0.7])}
  observation = seen({"a": v["a"] + 1.0}, None)
  bins = around({"a": v["a"] + 1.0}, 1.0, stochastic=True)
  observation = observation._replace(bins=bins)
  moved = {"a": u["a"] + 1.0}
  value = objectives.log_likelihood(moved, observation, 1e-6)
  # P(draw v | u) = 1 - |u - v| / step.
  np.testing.assert_allclose(
    value, np.sum(np.log(1 - np.abs(np.asarray(u["a"])))), atol=2e-3
  )


def test_saturated_stochastic_codes_are_bounded_on_one_side():
  # Code +s of a ternary leaf with s = 1: P = min(u, 1).
  one = {"a": jnp.ones(3)}
  bins = types.Bins(
    {"a": jnp.zeros(3)},
    {"a": jnp.full(3, jnp.inf)},
    {"a": jnp.full(3, 1 / 6)},
    {"a": jnp.bool_(True)},
  )
  u = jnp.array([0.4, 1.0, 3.0])
  value = objectives.log_likelihood({"a": u}, seen(one, bins), 1e-6)
  np.testing.assert_allclose(value, np.log(0.4), atol=2e-3)


def test_unbounded_entries_are_gaussian():
  v = {"a": jnp.array([0.5, -1.0])}
  bins = types.Bins(
    {"a": jnp.full(2, -jnp.inf)},
    {"a": jnp.full(2, jnp.inf)},
    {"a": jnp.array([0.25, 4.0])},
    {"a": jnp.bool_(False)},
  )
  u = {"a": jnp.array([1.0, 2.0])}
  got = objectives.log_likelihood(u, seen(v, bins), 1e-6)
  normal = scipy.stats.norm(np.array([0.5, -1.0]), np.array([0.5, 2.0]))
  want = np.sum(normal.logpdf([1, 2]) - normal.logpdf([0.5, -1]))
  np.testing.assert_allclose(got, want, rtol=1e-5)
  gradient = jax.grad(
    lambda u: objectives.log_likelihood(u, seen(v, bins), 1e-6)
  )(u)
  assert np.all(np.isfinite(gradient["a"]))


def rosenbrock(x):
  return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


@pytest.mark.parametrize("history", [3, 20])
def test_lbfgs_solves_what_scipy_solves(history):
  x0 = jnp.asarray(np.linspace(-1.2, 1.0, 12), jnp.float32)
  step = jax.jit(lambda s: lbfgs.step(rosenbrock, s))
  state = lbfgs.init(x0, history)
  values = []
  for _ in range(250):
    state = step(state)
    values.append(float(state.value))
  ours = np.asarray(state.x)
  theirs = scipy.optimize.minimize(
    lambda x: float(rosenbrock(jnp.asarray(x, jnp.float32))),
    np.asarray(x0, np.float64),
    jac=lambda x: np.asarray(
      jax.grad(rosenbrock)(jnp.asarray(x, jnp.float32)), np.float64
    ),
    method="L-BFGS-B",
    options={"maxcor": history, "maxiter": 250},
  )
  np.testing.assert_allclose(theirs.x, 1, atol=2e-2)
  np.testing.assert_allclose(ours, 1, atol=2e-2)
  assert np.all(np.diff(values) <= 1e-6)


def test_lbfgs_direction_is_the_two_loop_recursion():
  rng = np.random.default_rng(0)
  n, m = 9, 4
  root = rng.normal(size=(n, n))
  hessian = jnp.asarray(root @ root.T + np.eye(n), jnp.float32)

  def fn(x):
    return 0.5 * x @ hessian @ x + jnp.sum(jnp.cos(x))

  state = lbfgs.init(jnp.asarray(rng.normal(size=n), jnp.float32), m)
  pairs = []
  for _ in range(8):
    before = state
    state = lbfgs.step(fn, state)
    if np.isfinite(before.value):
      pairs.append((state.x - before.x, state.gradient - before.gradient))
  pairs = [(np.float64(s), np.float64(y)) for s, y in pairs[-m:]]
  # Nocedal and Wright 2006, algorithm 7.4.
  q = np.float64(state.gradient)
  alphas = []
  for s, y in reversed(pairs):
    alphas.append(s @ q / (s @ y))
    q = q - alphas[-1] * y
  s, y = pairs[-1]
  r = s @ y / (y @ y) * q
  for (s, y), alpha in zip(pairs, reversed(alphas), strict=True):
    r = r + s * (alpha - y @ r / (s @ y))
  np.testing.assert_allclose(lbfgs._direction(state), -r, rtol=2e-3, atol=1e-5)


def test_lbfgs_stops_where_there_is_no_descent():
  state = lbfgs.init(jnp.ones(3), 5)
  for _ in range(5):
    state = lbfgs.step(lambda x: jnp.sum(0.0 * x), state)
  assert state.failures >= 3
  np.testing.assert_array_equal(state.x, 1)


def test_the_cosine_of_nothing_has_a_slope():
  observed = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([[1.0]])}
  zeros = jax.tree.map(jnp.zeros_like, observed)

  def distance(simulated):
    return objectives.cosine(simulated, seen(observed))

  assert distance(zeros) == 1.0
  slope = jax.grad(distance)(zeros)
  assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(slope))
  assert distance(trees.scale(7.0, observed)) == pytest.approx(0.0, abs=1e-6)
  assert distance(trees.scale(-1e-4, observed)) == pytest.approx(2.0)


def test_cosine_matrix_is_scipys_dct():
  np.testing.assert_allclose(
    coordinates.cosine_matrix(7),
    scipy.fft.dct(np.eye(7), axis=0, norm="ortho"),
    atol=1e-6,
  )


def test_coordinates_are_inverted_and_orthogonal():
  model = rgb_model()
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (200, 4, 4, 3), dtype=np.uint8)
  x = jnp.asarray(images[:2] / 255.0, jnp.float32)
  for made in (
    coordinates.natural(model, 0.0),
    coordinates.natural(model, 1.0),
    coordinates.fitted(model.image_shape, images),
  ):
    z = made.from_images(x)
    np.testing.assert_allclose(made.to_images(z), x, atol=1e-4)
    jacobian = jax.jacobian(lambda z: made.to_images(z).reshape(-1))(
      jnp.zeros(48)
    )
    gram = jacobian.T @ jacobian
    np.testing.assert_allclose(
      gram, np.diag(made.deviation.reshape(-1) ** 2), atol=2e-4
    )


def test_fitted_coordinates_whiten_their_images():
  model = rgb_model()
  rng = np.random.default_rng(0)
  smooth = rng.normal(size=(4000, 2, 2, 3)).repeat(2, 1).repeat(2, 2)
  noisy = smooth * 40 + rng.normal(size=(4000, 4, 4, 3)) * 8 + 128
  images = np.clip(noisy, 0, 255).astype(np.uint8)
  made = coordinates.fitted(model.image_shape, images)
  z = np.asarray(made.from_images(jnp.asarray(images / 255.0, jnp.float32)))
  np.testing.assert_allclose(z.mean(0), 0, atol=0.02)
  np.testing.assert_allclose((z**2).mean(0), 1, atol=0.05)
  with pytest.raises(errors.UserError, match="uint8"):
    coordinates.fitted(model.image_shape, images.astype(np.float32))
  with pytest.raises(errors.UserError, match="100"):
    coordinates.fitted(model.image_shape, images[:5])


def images_in_place(count: int, seed: int = 0) -> np.ndarray:
  """[count, 4, 4, 3]: black above, below one of two patterns and some noise."""
  rng = np.random.default_rng(seed)
  patterns = np.random.default_rng(1).uniform(50, 200, (2, 2, 4, 3))
  below = patterns[rng.integers(0, 2, count)]
  x = np.concatenate([np.zeros_like(below), below], 1)
  noise = rng.normal(0, 6, x.shape) * (x > 0)
  return np.clip(np.round(x + noise), 0, 255).astype(np.uint8)


def test_the_full_covariance_is_the_one_of_most_likely_held_out_images():
  model, images = rgb_model(), images_in_place(600)
  made = coordinates.fitted(model.image_shape, images)
  stationary = coordinates.fitted(model.image_shape, images, stationary=True)

  def covariance(of: coordinates.Coordinates) -> np.ndarray:
    mean = of.to_images(jnp.zeros(48)).reshape(-1)
    steps = of.to_images(jnp.eye(48)).reshape(48, 48) - mean
    return np.asarray(steps, np.float64).T @ np.asarray(steps, np.float64)

  x = images.reshape(600, 48) / 255.0
  center = x - x.mean(0)
  held = np.arange(600) % 10 == 9
  simple = covariance(stationary)

  def of_share(share: float, rows: np.ndarray) -> np.ndarray:
    return (1 - share) * rows.T @ rows / len(rows) + share * simple

  likelihoods = [
    scipy.stats.multivariate_normal.logpdf(
      center[held], np.zeros(48), of_share(share, center[~held])
    ).mean()
    for share in coordinates.SHRINKAGES
  ]
  best = coordinates.SHRINKAGES[int(np.argmax(likelihoods))]
  assert best < 1
  np.testing.assert_allclose(
    covariance(made), of_share(best, center), atol=2e-5
  )
  # Images that neither was fitted to: far more likely than before.
  new = images_in_place(100, 2).reshape(100, 48) / 255.0 - x.mean(0)
  gain = [
    scipy.stats.multivariate_normal.logpdf(new, np.zeros(48), c).mean()
    for c in (covariance(made), simple)
  ]
  assert gain[0] > gain[1] + 20


def test_the_full_covariance_is_left_where_it_finds_nothing(monkeypatch):
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (120, 4, 4, 3), dtype=np.uint8)
  shape = rgb_model().image_shape
  made = coordinates.fitted(shape, images)
  stationary = coordinates.fitted(shape, images, stationary=True)
  # Nor is one of too many values.
  monkeypatch.setattr(coordinates, "MAX_FULL", 47)
  large = coordinates.fitted(shape, images_in_place(600))
  monkeypatch.undo()
  small = coordinates.fitted(shape, images_in_place(600))
  assert (large.deviation != small.deviation).any()
  z = jax.random.normal(jax.random.key(0), (48,))
  np.testing.assert_array_equal(made.to_images(z), stationary.to_images(z))


@pytest.mark.parametrize("label", [0, 1, 2])
def test_one_label_is_the_one_that_brute_force_finds(label):
  model = rgb_model()
  params = model.init(jax.random.key(0))
  x = jax.random.uniform(jax.random.key(1), (1, 1, 4, 4, 3))
  update = core.simulate(model, params, x, jnp.array([[label]]), 0.1)
  observation = types.Observation(params, update, None, None, jnp.float32(0.1))
  inferred = labels.infer(model, observation, core.Work())
  assert inferred.tolist() == [[label]]
  # Brute force: which label's update, for the true image, is the observed one.
  errors_ = [
    float(
      objectives.squared(
        core.simulate(model, params, x, jnp.array([[c]]), 0.1), observation
      )
    )
    for c in range(3)
  ]
  assert int(np.argmin(errors_)) == label


def test_label_counts_of_batches():
  model = rgb_model(classes=10)
  params = model.init(jax.random.key(0))
  right = 0
  for seed in range(10):
    keys = jax.random.split(jax.random.key(seed))
    x = jax.random.uniform(keys[0], (1, 8, 4, 4, 3))
    y = jax.random.randint(keys[1], (1, 8), 0, 10)
    update = core.simulate(model, params, x, y, 0.1)
    observation = types.Observation(
      params, update, None, None, jnp.float32(0.1)
    )
    counts = np.bincount(
      labels.infer(model, observation, core.Work(1, 8))[0], minlength=10
    )
    truth = np.bincount(y[0], minlength=10)
    right += np.minimum(counts, truth).sum()
  assert right >= 0.9 * 80


def digits():
  """MNIST, a model of it and its initial weights."""
  data = datasets.load("mnist_sample", None)
  model = models.make(
    "lenet_zhu", data.x_train.shape[1:], 10, data.mean, data.std, "slices"
  )
  params = model.init(jax.random.key(0))
  return data, model, params


@pytest.mark.parametrize("batch", [1, 4, 8])
def test_labels_where_a_defence_withholds_the_bias(batch):
  data, model, params = digits()
  right = 0
  for rows in np.arange(10 * batch).reshape(10, batch):
    x = jnp.asarray(data.x_train[rows] / np.float32(255))
    y = jnp.asarray(data.y_train[rows], jnp.int32)
    update = core.simulate(model, params, x[None], y[None], 0.1)
    update["dense1"]["bias"] = jnp.zeros(10)
    observation = types.Observation(
      params, update, None, None, jnp.float32(0.1)
    )
    found = labels.infer(model, observation, core.Work(1, batch))[0]
    counts = np.bincount(found, minlength=10)
    right += np.minimum(counts, np.bincount(y, minlength=10)).sum()
  assert right >= 0.85 * 10 * batch


def last_layer(features, gradient, error, draws):
  """An update of the last layer, rounded at random to multiples of `error`."""
  exact = {
    "kernel": jnp.outer(features, gradient),
    "bias": jnp.asarray(gradient),
  }

  def rounded(x, draw):
    return jnp.floor(x / error + draw) * error

  update = jax.tree.map(rounded, exact, draws)
  unknown = jax.tree.map(lambda x: jnp.full_like(x, error), update)
  bins = types.Bins(
    trees.subtract(update, unknown),
    jax.tree.map(jnp.add, update, unknown),
    jax.tree.map(lambda x: jnp.full_like(x, error**2 / 4), update),
    jax.tree.map(lambda x: True, update),
  )
  return exact, seen(update, bins)


LAST = models.Head(("kernel",), ("bias",))


def test_what_the_bias_gets_is_measured_by_every_feature():
  """One bias entry of noise, 500 entries of the kernel to tell the same."""
  rng = np.random.default_rng(0)
  gradient = np.array([-0.25, 0.05, -0.1, 0.3], np.float32)
  apart = []
  for _ in range(20):
    draws = {"kernel": rng.uniform(size=(500, 4)), "bias": rng.uniform(size=4)}
    # Those of noise are smaller and not quite the same.
    true = rng.uniform(0.5, 1.5, 500).astype(np.float32)
    of_noise = 0.7 * true * rng.uniform(0.9, 1.1, 500).astype(np.float32)
    exact, observation = last_layer(true, gradient, 0.3, draws)
    got = labels.gradients(observation, LAST, jnp.asarray(of_noise))
    apart.append(got - exact["bias"])
  error = np.sqrt(np.mean(np.square(apart)))
  # The kernel gives it up to a factor: 0.3 / 2 / sqrt(500), and the factor is
  # that of four noisy entries. The bias alone is off by up to 0.3 / 2.
  assert error < 0.05


@pytest.mark.parametrize("alone", ["bias", "kernel"])
def test_a_leaf_that_is_exact_or_alone_decides(alone):
  gradient = jnp.array([-0.25, 0.05, -0.1, 0.3])
  features = jnp.linspace(0.5, 1.5, 50)
  update = {"kernel": jnp.outer(features, gradient), "bias": gradient}
  bins = around(update, 0.0)
  other = {"bias": "kernel", "kernel": "bias"}[alone]
  infinite = jnp.full_like(update[other], jnp.inf)
  for field in ("upper", "variance"):
    getattr(bins, field)[other] = infinite
  bins.lower[other] = -infinite
  update[other] = 100 + update[other]  # Nothing is known of it.
  got = labels.gradients(seen(update, bins), LAST, features)
  np.testing.assert_allclose(got, gradient, rtol=1e-3)


def test_dead_features_leave_the_bias():
  gradient = jnp.array([-0.25, 0.05, -0.1, 0.3])
  update = {"kernel": jnp.zeros((50, 4)), "bias": gradient}
  observation = seen(update, around(update, 0.01))
  got = labels.gradients(observation, LAST, jnp.zeros(50))
  np.testing.assert_allclose(got, gradient, rtol=1e-3)


def test_shares_are_exact_where_images_of_a_class_are_alike():
  """Closed form: the classes' features and probabilities are put in."""
  rng = np.random.default_rng(0)
  weights = rng.normal(size=(40, 6)).astype(np.float32)
  offset = rng.normal(size=6).astype(np.float32)
  typical = rng.uniform(0.2, 0.8, 40).astype(np.float32)
  own = typical[:, None] + rng.normal(scale=0.02, size=(40, 6))
  counts = np.array([3, 0, 1, 0, 2, 2])
  answers = np.asarray(jax.nn.softmax(own.T @ weights + offset))
  # Off by more than an image: a guess from noise cannot do.
  noise = np.asarray(jax.nn.softmax(jnp.zeros(6)))
  assert 8 * np.abs(counts @ answers / 8 - noise).max() > 1
  residual = (counts[:, None] / 8) * (answers - np.eye(6))
  got = labels.shares(
    jnp.asarray(own @ residual),
    jnp.asarray(residual.sum(0)),
    jnp.asarray(weights),
    jnp.asarray(offset),
    jnp.asarray(typical),
    jnp.asarray(noise),
    8,
  )
  np.testing.assert_array_equal(labels.round_counts(8 * got, 8), counts)
  np.testing.assert_allclose(8 * got, counts, atol=0.25)


def test_label_counts_of_exact_batches():
  """Noise alone gives 91 % of these."""
  data, model, params = digits()
  places = np.random.default_rng(5).permutation(len(data.y_train))[:384]

  @jax.jit
  def find(x, y):
    update = core.simulate(model, params, x[None], y[None], 0.1)
    observation = types.Observation(
      params, update, None, None, jnp.float32(0.1)
    )
    return labels.infer(model, observation, core.Work(1, 8))[0]

  found = []
  for rows in places.reshape(48, 8):
    x = jnp.asarray(data.x_train[rows] / np.float32(255))
    y = jnp.asarray(data.y_train[rows], jnp.int32)
    found.append(metrics.label_accuracy(np.asarray(y), find(x, y)))
  assert np.mean(found) >= 0.97


@pytest.mark.parametrize(
  "spec", ["int2(rounding=stochastic)", "int2(rounding=dither)", "randomk"]
)
def test_label_counts_of_coarse_updates(spec):
  """Who knows the codec reads the counts; who does not, hardly guesses."""
  data, model, params = digits()
  defense = defenses.make(spec, params)
  right = {True: 0, False: 0}
  for i, rows in enumerate(np.arange(80).reshape(10, 8)):
    x = jnp.asarray(data.x_train[rows] / np.float32(255))
    y = jnp.asarray(data.y_train[rows], jnp.int32)
    update = core.simulate(model, params, x[None], y[None], 0.1)
    payload, _ = defense.codec.encode(
      jax.random.key(i), update, defense.codec.init(params)
    )
    for knows in right:
      observation = types.Observation(
        params,
        defense.codec.decode(payload),
        defenses.bins(defense, payload) if knows else None,
        None,
        jnp.float32(0.1),
      )
      found = labels.infer(model, observation, core.Work(1, 8))[0]
      right[knows] += 8 * metrics.label_accuracy(np.asarray(y), found)
  assert right[True] >= 0.8 * 80 and right[True] >= right[False] + 15


def test_what_was_not_sent_counts_for_nothing():
  """Entries left out at random say nothing of the image, a whole leaf's too."""
  update = two_leaves()
  codec = precision.make("randomk", update, ratio=0.3)
  for i in range(200):
    payload, _ = codec.encode(jax.random.key(i), update, codec.init(update))
    left_out = jax.tree.map(jnp.isinf, codec.bins(payload).variance)
    if left_out["b"].all() and not left_out["a"].all():
      break
  else:
    raise AssertionError("none of 200 payloads left a leaf out")
  observation = seen(codec.decode(payload), codec.bins(payload))
  # What was sent is decoded larger, but known as it was.
  for told, u, out in zip(
    *map(jax.tree.leaves, (core.told(observation), update, left_out)),
    strict=True,
  ):
    np.testing.assert_array_equal(told, jnp.where(out, 0.0, u))
  for w, out in zip(
    *map(jax.tree.leaves, (objectives.weights(observation), left_out)),
    strict=True,
  ):
    np.testing.assert_array_equal(w == 0, out)
  moved = jax.tree.map(
    lambda u, out: jnp.where(out, u + 3.0, u), update, left_out
  )
  for name in ("squared", "squared_and_absolute"):
    objective = objectives.OBJECTIVES[name]
    assert float(objective(moved, observation)) < 1e-10
  for smoothing in (1.0, 1e-4):

    def likelihood(u, smoothing=smoothing):
      return objectives.log_likelihood(u, observation, smoothing)

    assert float(likelihood(moved)) == float(likelihood(update))
    slope = jax.grad(likelihood)(moved)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slope))
    np.testing.assert_array_equal(slope["b"], 0)


def test_rounded_counts_are_the_nearest_with_that_sum():
  rng = np.random.default_rng(0)
  for _ in range(20):
    expected = rng.dirichlet(np.ones(4)) * 6
    got = np.asarray(labels.round_counts(jnp.asarray(expected), 6))
    grids = np.stack(np.meshgrid(*[np.arange(7)] * 4), -1).reshape(-1, 4)
    grids = grids[grids.sum(1) == 6]
    best = np.abs(grids - expected).sum(1).min()
    assert got.sum() == 6
    np.testing.assert_allclose(np.abs(got - expected).sum(), best, atol=1e-5)


def test_predicted_leakage_of_a_linear_model_is_the_closed_form():
  # One dense layer: the update of one step is linear in the image only up to
  # the softmax, so the closed form is checked on a model whose softmax is at
  # its vertex: the loss gradient is then a constant times the image.
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (500, 4, 4, 3), dtype=np.uint8)
  shape, zero, one = (4, 4, 3), np.zeros(3, np.float32), np.ones(3, np.float32)

  def apply(params, x):
    flat = x.reshape(x.shape[0], -1)
    return flat @ params["dense"]["kernel"] + params["dense"]["bias"]

  model = types.Model("linear", lambda key: {}, apply, shape, 2, zero, one)
  params = {
    "dense": {"kernel": jnp.zeros((48, 2)), "bias": jnp.array([50.0, 0.0])}
  }
  # Label 1 at logits (50, 0): probability minus one-hot is (1, -1).
  x = images[:2] / np.float32(255)
  found = leakage.sensitivity(
    model, params, x, np.array([1, 1]), 1.0, images, components=48
  )
  assert found[0].leaves == ("dense/bias", "dense/kernel")
  noise = np.array([[1.0, 0.02]] * 2)
  made = coordinates.fitted(model.image_shape, images)
  variance = made.deviation.reshape(-1) ** 2
  # Each pixel is seen twice, with opposite signs, under noise 0.02.
  floor = 1e-8 * found[0].signal[1]
  posterior = 1 / (1 / variance + 2 / (0.02 + floor))
  want = -10 * np.log10(posterior.mean())
  got = leakage.expected_psnr_db(found, noise)
  np.testing.assert_allclose(got, want, atol=0.02)
  # Half of the entries say as much as all with twice the squared error.
  np.testing.assert_allclose(
    leakage.expected_psnr_db(found, noise, np.full((2, 2), 0.5)),
    leakage.expected_psnr_db(found, 2 * noise),
    atol=1e-3,
  )
  # A leaf that is not sent says nothing: only the prior is left.
  none = leakage.expected_psnr_db(found, np.full((2, 2), np.inf))
  np.testing.assert_allclose(none, -10 * np.log10(variance.mean()), atol=1e-3)
