"""The attack suite: contracts over all attacks, and the runner."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mpqfl_jax import attacks, errors, local, models, types
from mpqfl_jax.attacks import core, descent, inverting_gradients

MEAN, STD = np.array([0.3], np.float32), np.array([0.4], np.float32)

AUXILIARY = np.random.default_rng(0).integers(
  0, 256, (200, 6, 6, 1), dtype=np.uint8
)


def small_model():
  """Two dense layers with a smooth activation: quick to compile, invertible."""

  def init(key):
    keys = jax.random.split(key, 4)

    def dense(keys, inputs, outputs):
      return {
        "kernel": jax.random.normal(keys[0], (inputs, outputs)) / 3,
        "bias": jax.random.normal(keys[1], (outputs,)) / 3,
      }

    return {"dense1": dense(keys[:2], 36, 24), "dense2": dense(keys[2:], 24, 4)}

  def apply(params, x):
    z = ((x - MEAN) / STD).reshape(x.shape[0], -1)
    z = jax.nn.sigmoid(
      z @ params["dense1"]["kernel"] + params["dense1"]["bias"]
    )
    return z @ params["dense2"]["kernel"] + params["dense2"]["bias"]

  layers = (
    types.Layer("dense1", "sigmoid"),
    types.Layer("dense2", "identity"),
  )
  return types.Model("small", init, apply, (6, 6, 1), 4, MEAN, STD, layers)


def observe(
  model, n=2, steps=1, batch=1, seed=0, labels=False, rate=0.1, epochs=1, x=None
):
  """n observations of clients that hold random images, and those images."""
  keys = jax.random.split(jax.random.key(seed), 3)
  shape = (n, steps, batch)
  if x is None:
    x = jax.random.uniform(keys[0], (*shape, *model.image_shape))
  y = jax.random.randint(keys[1], shape, 0, model.num_classes)
  params = model.init(keys[2])
  update = jax.vmap(
    lambda x, y: attacks.simulate(model, params, x, y, rate, epochs)
  )(x, y)
  repeat = lambda a: jnp.broadcast_to(a, (n, *a.shape))  # noqa: E731
  observation = types.Observation(
    jax.tree.map(repeat, params),
    update,
    None,
    y if labels else None,
    jnp.full((n,), rate),
  )
  return observation, np.asarray(x), np.asarray(y)


def psnr(a, b):
  return -10 * np.log10(np.mean((a - b) ** 2, axis=(-3, -2, -1)))


def test_simulate_one_step_is_rate_times_gradient():
  model = small_model()
  params = model.init(jax.random.key(1))
  x = jax.random.uniform(jax.random.key(2), (1, 3, 6, 6, 1))
  y = jnp.array([[0, 3, 1]])
  update = attacks.simulate(model, params, x, y, 0.5)

  def loss(params):
    return jnp.mean(models.cross_entropy(model, params, x[0], y[0]))

  expected = jax.tree.map(lambda g: 0.5 * g, jax.grad(loss)(params))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
    update,
    expected,
  )


def test_simulate_many_steps_is_params_minus_local_params():
  model = small_model()
  params = model.init(jax.random.key(1))
  x = jax.random.uniform(jax.random.key(2), (4, 2, 6, 6, 1))
  y = jnp.arange(8).reshape(4, 2) % 4
  update = attacks.simulate(model, params, x, y, 0.3)
  local = params
  for images, targets in zip(x, y, strict=True):
    grad = jax.grad(
      lambda p: jnp.mean(models.cross_entropy(model, p, images, targets))
    )(local)
    local = jax.tree.map(lambda p, g: p - 0.3 * g, local, grad)
  jax.tree.map(
    lambda u, a, b: np.testing.assert_allclose(u, a - b, atol=2e-6),
    update,
    params,
    local,
  )


def test_simulate_many_epochs_is_what_a_client_sends():
  # One batch an epoch, so that the client's own order does not matter: the
  # local training of the simulator itself is the oracle.
  model = small_model()
  params = model.init(jax.random.key(1))
  x = jax.random.randint(jax.random.key(2), (3, 6, 6, 1), 0, 256)
  y = jnp.array([0, 3, 1])
  examples = types.Examples(x.astype(jnp.uint8), y, jnp.arange(3))
  schedule = local.Schedule(batch_size=4, max_examples=3, epochs=3)
  train = local.sgd(model, optax.sgd, schedule)
  start, size = jnp.int32(0), jnp.int32(3)
  sent = train(params, examples, start, size, jax.random.key(0), 0.2)
  update = attacks.simulate(model, params, x[None] / 255, y[None], 0.2, 3)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6),
    update,
    sent.update,
  )


def test_a_client_of_several_epochs_is_taken_back():
  model = small_model()
  observation, x, y = observe(model, n=1, epochs=3, rate=0.5)
  found = {}
  for epochs in (1, 3):
    attack = attacks.make("idlg", model, epochs=epochs, iterations=300)
    run = attacks.run(attack, observation, jax.random.key(3), progress=False)
    found[epochs] = psnr(run.x[:, 0], x[:, 0, 0])[0]
    np.testing.assert_array_equal(run.labels, y[:, 0])
  # An attacker who takes the epochs for one step ends far off.
  assert found[3] > 40
  assert found[3] > found[1] + 10


@pytest.mark.parametrize("name", ["tag", "gradinversion"])
def test_first_order_attacks_take_back_the_image(name):
  model = small_model()
  observation, x, y = observe(model, n=2)
  attack = attacks.make(
    name,
    model,
    iterations=600,
    **({"total_variation": 0.0} if name == "gradinversion" else {}),
  )
  found = attacks.run(attack, observation, jax.random.key(3), progress=False)
  assert np.all(psnr(found.x[:, 0], x[:, 0, 0]) > 25)
  np.testing.assert_array_equal(found.labels, y[:, 0])


def test_members_are_drawn_to_their_mean():
  model = small_model()
  observation, _, _ = observe(model, n=1)
  one = jax.tree.map(lambda a: a[0], observation)
  apart = []
  for consistency in (0.0, 100.0):
    attack = attacks.make("gradinversion", model, consistency=consistency)
    state = attack.init(jax.random.key(0), one)
    step = jax.jit(attack.step)
    # Early on: in the end, all of them find the one solution.
    for _ in range(10):
      state, _ = step(state, one)
    apart.append(float(jnp.std(state.v, 0).mean()))
  assert apart[1] < 0.5 * apart[0]


def test_statistics_of_batches_that_no_model_keeps_are_refused():
  with pytest.raises(errors.UserError, match="batch_norm=0"):
    attacks.make("gradinversion", small_model(), batch_norm=0.1)


def test_an_untrained_generator_takes_a_smooth_image_back():
  # A bright disc on a dark ground, larger than the generator's coarsest pixel.
  side = 16
  rows, columns = np.mgrid[:side, :side]
  disc = ((rows - 6) ** 2 + (columns - 9) ** 2 < 20) * 0.7 + 0.15
  model = models.make("lenet_zhu", (side, side, 1), 4, MEAN, STD, conv="slices")
  params = model.init(jax.random.key(0))
  x = jnp.asarray(disc, jnp.float32)[None, None, :, :, None]
  update = attacks.simulate(model, params, x, jnp.array([[2]]), 0.1)
  observation = jax.tree.map(
    lambda a: jnp.asarray(a)[None],
    types.Observation(params, update, None, None, jnp.float32(0.1)),
  )
  attack = attacks.make("deep_image_prior", model, iterations=300, width=16)
  found = attacks.run(attack, observation, jax.random.key(0), progress=False)
  assert psnr(found.x[0], np.asarray(x[0]))[0] > 18


@pytest.mark.parametrize("name", ["dlg", "idlg"])
@pytest.mark.parametrize("labels", [False, True])
def test_dlg_takes_back_the_image_and_the_label(name, labels):
  model = small_model()
  observation, x, y = observe(model, n=2, labels=labels)
  attack = attacks.make(name, model, iterations=400, tolerance=1e-11)
  found = attacks.run(attack, observation, jax.random.key(3), progress=False)
  assert np.all(psnr(found.x[:, 0], x[:, 0, 0]) > 40)
  np.testing.assert_array_equal(found.labels, y[:, 0])
  assert np.all(found.objective < 1e-6)


def test_analytic_inversion_is_exact():
  model = models.make("mlp", (6, 6, 1), 4, MEAN, STD)
  observation, x, y = observe(model, n=3)
  found = attacks.run(
    attacks.make("analytic", model),
    observation,
    jax.random.key(0),
    progress=False,
  )
  assert np.all(psnr(found.x[:, 0], x[:, 0, 0]) > 100)
  np.testing.assert_array_equal(found.labels, y[:, 0])


def test_map_beats_dlg_on_a_coarse_update_of_structured_images():
  # Smooth images, so that a prior from others like them has something to say.
  model = small_model()
  key = jax.random.key(4)
  plain = jax.random.uniform(key, (300, 2, 2, 1))
  smooth = jnp.repeat(jnp.repeat(plain, 3, 1), 3, 2)
  params = model.init(jax.random.key(5))
  x, y = smooth[:2, None, None], jnp.array([[[1]], [[3]]])
  exact = jax.vmap(lambda x, y: attacks.simulate(model, params, x, y, 1.0))(
    x, y
  )
  step = jax.tree.map(lambda u: jnp.max(jnp.abs(u)) / 7, exact)
  update = jax.tree.map(lambda u, s: s * jnp.round(u / s), exact, step)
  bins = types.Bins(
    jax.tree.map(lambda u, s: u - s / 2, update, step),
    jax.tree.map(lambda u, s: u + s / 2, update, step),
    jax.tree.map(lambda u, s: jnp.full_like(u, s * s / 12), update, step),
    jax.tree.map(lambda u: False, update),
  )
  seen = types.Observation(
    jax.tree.map(lambda a: jnp.broadcast_to(a, (2, *a.shape)), params),
    update,
    bins,
    y,
    jnp.ones(2),
  )
  auxiliary = np.uint8(np.round(np.asarray(smooth[2:]) * 255))
  found = {}
  for name, observed in (("map", seen), ("dlg", seen._replace(bins=None))):
    attack = attacks.make(name, model, auxiliary=auxiliary, iterations=200)
    run = attacks.run(attack, observed, jax.random.key(1), progress=False)
    found[name] = psnr(run.x[:, 0], np.asarray(x)[:, 0, 0])
  assert np.all(found["map"] > found["dlg"] + 3)
  assert np.all(found["map"] > 20)


@pytest.mark.parametrize("variables", [descent.pixels, descent.natural])
def test_what_is_searched_over_stands_for_images(variables):
  model = small_model()
  found = variables(model, core.Work(1, 2, 1))

  def images(v):
    return np.asarray(found.to_images(v)) * STD + MEAN

  start = found.init(jax.random.key(0))
  assert images(start).shape == (2, 6, 6, 1)
  far = jax.tree.map(lambda a: 30 * a, start)
  near = found.project(far)
  # The nearest image: what lies in [0, 1] stays, the rest is cut off.
  want = np.clip(images(far), 0, 1)
  assert np.any(want == 1) and np.any(want == 0)
  np.testing.assert_allclose(images(near), want, atol=2e-5)
  np.testing.assert_allclose(found.project(near), near, atol=2e-5)


def test_in_pixels_a_step_is_the_papers():
  model = small_model()
  observation, _, _ = observe(model, n=1, labels=True)
  one = jax.tree.map(lambda a: a[0], observation)
  attack = attacks.make(
    "inverting_gradients", model, search="pixels", learning_rate=0.03
  )
  state = attack.init(jax.random.key(0), one)
  moved = attack.step(state, one)[0].v
  low, high = (0 - MEAN) / STD, (1 - MEAN) / STD
  # Adam's first step along a sign is the rate, whichever the gradient's length.
  ways = [np.clip(state.v + way, low, high) for way in (-0.03, 0.03)]
  error = np.min([np.abs(moved - way) for way in ways], axis=0)
  assert np.max(error) < 1e-6 and np.any(moved != state.v)


def test_rates_of_searches():
  pixels = inverting_gradients.SEARCHES["pixels"].rate(0.1, 4800)
  for step, rate in (
    *((0, 0.1), (1799, 0.1), (1801, 0.01), (2999, 0.01)),
    *((3001, 1e-3), (4199, 1e-3), (4201, 1e-4), (4799, 1e-4)),
  ):
    assert float(pixels(step)) == pytest.approx(rate)
  natural = inverting_gradients.SEARCHES["natural"].rate(0.1, 4800)
  for step, rate in ((0, 0.1), (1600, 0.075), (2400, 0.05), (4800, 0.0)):
    assert float(natural(step)) == pytest.approx(rate, abs=1e-6)


def test_rounding_of_a_distance_does_not_choose_between_images():
  scale = inverting_gradients.SEARCHES["natural"].scale
  logs = scale(jnp.array([-1e-7, 0.0, 1e-7, 1e-6, 1e-5, 1.0, 2.0]))
  assert np.all(np.diff(logs) >= 0) and np.all(np.diff(logs)[2:] > 0.5)
  assert logs[2] - logs[0] < 0.1
  slope = jax.vmap(jax.grad(scale))(jnp.array([-1e-7, 1e-9, 1e-6]))
  assert np.all(np.isfinite(slope))


def test_a_smooth_image_comes_back_sooner_in_natural_coordinates():
  model = models.make("mlp", (8, 8, 1), 4, MEAN, STD)
  keys = jax.random.split(jax.random.key(5), 2)
  coarse = jax.random.uniform(keys[0], (2, 1, 1, 3, 3, 1))
  x = jax.image.resize(coarse, (2, 1, 1, 8, 8, 1), "cubic").clip(0, 1)
  observation, x, _ = observe(model, n=2, x=x, labels=True)
  found = {}
  for search in ("natural", "pixels"):
    attack = attacks.make(
      "inverting_gradients", model, search=search, iterations=60
    )
    run = attacks.run(attack, observation, keys[1], progress=False)
    found[search] = psnr(run.x[:, 0], x[:, 0, 0])
  assert np.all(found["natural"] > found["pixels"] + 3)


def test_inverting_gradients_takes_back_a_multi_step_batch():
  model = small_model()
  observation, x, y = observe(model, n=1, steps=2, batch=2, labels=True)
  attack = attacks.make(
    "inverting_gradients",
    model,
    steps=2,
    batch=2,
    iterations=600,
    total_variation=0.0,
  )
  found = attacks.run(attack, observation, jax.random.key(3), progress=False)
  assert found.x.shape == (1, 4, 6, 6, 1)
  # Images of one step may come back in any order: best match.
  truth = x.reshape(4, 6, 6, 1)
  table = psnr(found.x[0][:, None], truth[None])
  assert np.median(table.max(0)) > 20
  np.testing.assert_array_equal(found.labels[0], y.reshape(-1))


# These share their search with others here.
_ALIKE = ("idlg", "tag", "deep_image_prior")


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(name, marks=[pytest.mark.slow] if name in _ALIKE else [])
    for name in sorted(attacks.ATTACKS.keys() - attacks.MALICIOUS)
  ],
)
def test_results_do_not_depend_on_lanes_chunks_or_company(name):
  model = small_model()
  observation, _, _ = observe(model, n=3)
  options = {"iterations": 12, "restarts": 2}
  if name in ("analytic", "rgap"):
    options = {}
  elif name == "deep_image_prior":
    options["width"] = 8
  elif name == "learning_to_invert":
    options |= {"hidden": 16, "training_batch": 8}
  attack = attacks.make(name, model, auxiliary=AUXILIARY, **options)
  run = lambda o, **kw: attacks.run(  # noqa: E731
    attack, o, jax.random.key(5), progress=False, **kw
  )
  one = run(observation, width=1, chunk=100)
  for other in (
    run(observation, width=1, chunk=5),
    run(observation, width=4, chunk=7),
  ):
    np.testing.assert_allclose(other.x, one.x, atol=2e-3)
    np.testing.assert_allclose(other.objective, one.objective, rtol=1e-3)
    np.testing.assert_array_equal(other.labels, one.labels)
  again = run(observation, width=1, chunk=100)
  np.testing.assert_array_equal(again.x, one.x)
  assert again.compile_seconds == 0
  first = run(jax.tree.map(lambda a: a[:1], observation), width=1)
  np.testing.assert_allclose(first.x[0], one.x[0], atol=1e-5)
  assert np.all(one.x >= 0) and np.all(one.x <= 1)
  assert np.all(one.iterations <= 2 * 12)


def test_more_restarts_never_raise_the_objective():
  model = small_model()
  observation, _, _ = observe(model, n=2)
  attack = attacks.make("dlg", model, iterations=20)
  few, many = (
    attacks.run(
      attack, observation, jax.random.key(0), restarts=r, progress=False
    )
    for r in (1, 3)
  )
  assert np.all(many.objective <= few.objective)


def test_interrupt_keeps_what_was_found():
  model = small_model()
  observation, _, _ = observe(model, n=2)
  attack = attacks.make("inverting_gradients", model, iterations=10)
  calls: list[str] = []
  real = attacks.runner._call
  with pytest.MonkeyPatch.context() as patch:

    def call(program, name, *args):
      calls.append(name)
      if calls.count("advance") == 3:
        raise KeyboardInterrupt
      return real(program, name, *args)

    patch.setattr(attacks.runner, "_call", call)
    with pytest.raises(attacks.Interrupted) as caught:
      attacks.run(
        attack, observation, jax.random.key(0), chunk=2, progress=False, width=2
      )
  assert caught.value.partial.iterations.tolist() == [4, 4]
  assert np.all(np.isfinite(caught.value.partial.objective))


def test_mistakes_are_named():
  model = small_model()
  with pytest.raises(errors.UserError, match=r"unknown attack 'dgl'.*'dlg'"):
    attacks.make("dgl", model)
  with pytest.raises(errors.UserError, match="iterations"):
    attacks.make("dlg", model, iteration=3)
  with pytest.raises(errors.UserError, match="takes no settings"):
    attacks.make("analytic", model, iterations=3)
  with pytest.raises(errors.UserError, match="auxiliary"):
    attacks.make("map", model)
  for options, message in (
    ({"prior": "learnt"}, "Did you mean 'learned'"),
    ({"prior": "learned", "stages": 300}, "expected 2 to 250"),
    ({"prior": "learned", "training": 0}, "at least 1 step"),
    ({"last_blur": 0.01}, "expected one that falls"),
    ({"first_blur": 0.1, "last_blur": 0.2}, "expected one that falls"),
  ):
    with pytest.raises(errors.UserError, match=message):
      attacks.make("map", model, auxiliary=np.zeros(1), **options)
  with pytest.raises(errors.UserError, match="one image of one step"):
    attacks.make("analytic", model, batch=2)
  lenet = models.make("lenet_zhu", (6, 6, 1), 4, MEAN, STD)
  observation, _, _ = observe(lenet, n=1)
  with pytest.raises(errors.UserError, match="mlp"):
    attacks.run(attacks.make("analytic", lenet), observation, jax.random.key(0))
  with pytest.raises(errors.UserError, match="objective"):
    attacks.make("inverting_gradients", model, objective="cos")
  with pytest.raises(errors.UserError, match="search"):
    attacks.make("inverting_gradients", model, search="pixel")
  for name in ("inverting_gradients", "tag", "gradinversion"):
    with pytest.raises(errors.UserError, match="iterations=0"):
      attacks.make(name, model, iterations=0)
  observation, _, _ = observe(model, n=1, batch=2)
  idlg = attacks.make("idlg", model, batch=2)
  with pytest.raises(errors.UserError, match="one image"):
    attacks.run(idlg, observation, jax.random.key(0), progress=False)
  observation, _, _ = observe(model, n=1, batch=2, labels=True)
  dlg = attacks.make("dlg", model)
  with pytest.raises(errors.UserError, match="1 steps of 1 images"):
    attacks.run(dlg, observation, jax.random.key(0), progress=False)
  with pytest.raises(errors.UserError, match="restarts"):
    attacks.run(
      attacks.make("dlg", model, batch=2),
      observation,
      jax.random.key(0),
      restarts=0,
    )


def _answers(objectives):
  """A direct attack whose answers have these objectives, one after another."""
  calls = iter(objectives)

  def solve(observation, given):
    value = next(calls)
    if value is None:
      raise KeyboardInterrupt
    x = np.full((1, 6, 6, 1), value, np.float32)
    return attacks.core.Answer(x, np.array([0], np.int32), value, 3)

  return attacks.Direct("told", solve, lambda observation: None, 1)


def test_the_best_of_direct_answers_counts():
  observation, _, _ = observe(small_model(), n=2)
  found = attacks.run(
    _answers([0.5, 0.2, 0.3, 0.4]),
    observation,
    jax.random.key(0),
    restarts=2,
    progress=False,
  )
  np.testing.assert_allclose(found.objective, [0.2, 0.3])
  np.testing.assert_allclose(found.x[:, 0, 0, 0, 0], [0.2, 0.3])
  np.testing.assert_array_equal(found.iterations, 6)


def test_an_interrupt_keeps_direct_answers():
  observation, _, _ = observe(small_model(), n=3)
  with pytest.raises(attacks.Interrupted) as caught:
    attacks.run(
      _answers([0.5, None]), observation, jax.random.key(0), progress=False
    )
  np.testing.assert_allclose(
    caught.value.partial.objective, [0.5, np.inf, np.inf]
  )
