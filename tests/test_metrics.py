"""Image metrics against scikit-image, closed forms and published tables."""

import itertools
import warnings

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest
import scipy.ndimage
import scipy.spatial.distance
import skimage.metrics

from mpqfl_jax import metrics


def _images(n=3, shape=(28, 28, 1), seed=0):
  return np.random.default_rng(seed).uniform(size=(n, *shape))


def _smooth(n, size, channels):
  """Sums of low-frequency waves in [0, 1]: images with structure."""
  rng = np.random.default_rng(3)
  grid = np.linspace(0, np.pi, size)
  waves = np.cos(np.arange(4)[:, None] * grid)
  mix = rng.normal(size=(n, channels, 4, 4))
  x = np.einsum("ncij,ih,jw->nhwc", mix, waves, waves)
  return (x - x.min()) / (x.max() - x.min())


def test_psnr_of_a_constant_error_is_its_closed_form():
  x = np.full((2, 28, 28, 3), 0.5)
  y = x + np.array([0.1, 0.01])[:, None, None, None]
  np.testing.assert_allclose(metrics.mse(x, y), [1e-2, 1e-4])
  np.testing.assert_allclose(metrics.psnr_db(x, y), [20.0, 40.0])


@pytest.mark.parametrize("shape", [(28, 28, 1), (32, 32, 3), (11, 17, 2)])
def test_psnr_and_mse_are_scikit_images(shape):
  x, y = _images(4, shape), _images(4, shape, seed=1)
  psnr = [
    skimage.metrics.peak_signal_noise_ratio(a, b, data_range=1)
    for a, b in zip(x, y, strict=True)
  ]
  mse = [
    skimage.metrics.mean_squared_error(a, b) for a, b in zip(x, y, strict=True)
  ]
  np.testing.assert_allclose(metrics.psnr_db(x, y), psnr)
  np.testing.assert_allclose(metrics.mse(x, y), mse)


def test_psnr_is_capped_and_finite():
  x = _images()
  np.testing.assert_array_equal(metrics.psnr_db(x, x), metrics.MAX_DB)


def test_values_outside_the_range_are_clipped():
  x = _images()
  wild = _images(seed=1) * 4 - 2
  tame = np.minimum(np.maximum(wild, 0), 1)
  for metric in (metrics.mse, metrics.psnr_db, metrics.ssim):
    np.testing.assert_array_equal(metric(x, wild), metric(x, tame))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_diverged_reconstruction_is_the_worst_there_is(bad):
  x = _images()
  y = np.full_like(x, bad)
  np.testing.assert_array_equal(metrics.mse(x, y), 1)
  np.testing.assert_array_equal(metrics.psnr_db(x, y), 0)
  np.testing.assert_array_equal(metrics.ssim(x, y), 0)
  assert not metrics.reidentified(x, y, _images(20, seed=4)).any()


def test_one_bad_pixel_counts_as_an_error_of_one():
  x = _images(1, (12, 10, 1))
  y = x.copy()
  y[0, 3, 4, 0] = np.nan
  np.testing.assert_allclose(metrics.mse(x, y), [1 / 120])


@pytest.mark.parametrize(("size", "channels"), [(28, 1), (32, 3)])
def test_ssim_is_scikit_images_plane_by_plane(size, channels):
  x = _smooth(3, size, channels)
  y = np.clip(x + 0.1 * _images(3, x.shape[1:]), 0, 1)
  expected = [
    np.mean(
      [
        skimage.metrics.structural_similarity(
          x[i, :, :, c],
          y[i, :, :, c],
          gaussian_weights=True,
          sigma=1.5,
          use_sample_covariance=False,
          data_range=1,
        )
        for c in range(channels)
      ]
    )
    for i in range(3)
  ]
  np.testing.assert_allclose(metrics.ssim(x, y), expected, rtol=1e-12)
  np.testing.assert_allclose(metrics.ssim(x, x), 1)


def test_ssim_of_two_constants_is_its_closed_form():
  # No variance, no covariance: only the luminance term of equation 13 is left.
  x = np.full((1, 28, 28, 1), 0.2)
  y = np.full((1, 28, 28, 1), 0.6)
  c1 = 0.01**2
  expected = (2 * 0.2 * 0.6 + c1) / (0.2**2 + 0.6**2 + c1)
  np.testing.assert_allclose(metrics.ssim(x, y), [expected])


def _by_hand(x, y):
  """Wang et al. 2003 for one plane and two scales, by SciPy's filter."""

  def parts(x, y):
    # The window of 11 pixels; only where it lies inside the image.
    def blur(a):
      return scipy.ndimage.gaussian_filter(a, 1.5, truncate=3.5)[5:-5, 5:-5]

    mx, my = blur(x), blur(y)
    vx, vy = blur(x * x) - mx**2, blur(y * y) - my**2
    both = blur(x * y) - mx * my
    light = (2 * mx * my + 0.01**2) / (mx**2 + my**2 + 0.01**2)
    rest = (2 * both + 0.03**2) / (vx + vy + 0.03**2)
    return light, rest

  def half(a):
    return (a[::2, ::2] + a[1::2, ::2] + a[::2, 1::2] + a[1::2, 1::2]) / 4

  fine = parts(x, y)[1].mean()
  coarse = np.prod(parts(half(x), half(y)), axis=0).mean()
  total = 0.0448 + 0.2856
  return fine ** (0.0448 / total) * coarse ** (0.2856 / total)


@pytest.mark.parametrize(("size", "channels"), [(28, 1), (32, 3)])
def test_multi_scale_ssim_is_its_definition(size, channels):
  x = _smooth(3, size, channels)
  y = np.clip(x + 0.2 * _images(3, x.shape[1:]), 0, 1)
  expected = [
    np.mean([_by_hand(x[i, ..., c], y[i, ..., c]) for c in range(channels)])
    for i in range(3)
  ]
  np.testing.assert_allclose(metrics.ms_ssim(x, y), expected, rtol=1e-6)
  np.testing.assert_allclose(metrics.ms_ssim(x, x), 1)


def test_multi_scale_ssim_at_its_limits():
  x = _smooth(1, 28, 1)
  # One scale only: the index of that scale itself.
  small = x[:, :20, :20]
  noisy = np.clip(small + 0.1 * _images(1, small.shape[1:]), 0, 1)
  np.testing.assert_allclose(
    metrics.ms_ssim(small, noisy), metrics.ssim(small, noisy)
  )
  # A negative has opposite structure everywhere.
  np.testing.assert_array_equal(metrics.ms_ssim(x, 1 - x), 0)
  np.testing.assert_array_equal(metrics.ms_ssim(x, np.full_like(x, np.nan)), 0)
  # Five scales fit into 176 pixels; the published exponents sum to 1.0001.
  dim, bright = np.full((1, 176, 176, 1), 0.2), np.full((1, 176, 176, 1), 0.6)
  light = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)
  np.testing.assert_allclose(
    metrics.ms_ssim(dim, bright), [light ** (0.1333 / 1.0001)]
  )


def test_label_accuracy_counts_what_two_multisets_share():
  assert (
    metrics.label_accuracy(np.array([3, 1, 1, 4]), np.array([1, 4, 5, 1]))
    == 0.75
  )
  assert (
    metrics.label_accuracy(np.array([1, 1, 1]), np.array([1, 2, 2])) == 1 / 3
  )
  assert metrics.label_accuracy(np.array([0]), np.array([7])) == 0


def test_match_finds_a_shuffled_batch():
  x = _images(6)
  order = np.random.default_rng(5).permutation(6)
  shuffled = np.clip(x + 0.1 * _images(6, seed=2), 0, 1)[order]
  np.testing.assert_array_equal(order[metrics.match(x, shuffled)], np.arange(6))


@given(seed=st.integers(0, 10_000))
def test_match_is_the_best_of_all_permutations(seed):
  rng = np.random.default_rng(seed)
  x, y = rng.uniform(size=(2, 4, 3, 3, 1))
  cost = scipy.spatial.distance.cdist(
    x.reshape(4, -1), y.reshape(4, -1), "sqeuclidean"
  )
  best = min(
    itertools.permutations(range(4)),
    key=lambda p: sum(cost[i, j] for i, j in enumerate(p)),
  )
  np.testing.assert_array_equal(metrics.match(x, y), best)


def test_match_gives_a_diverged_reconstruction_to_nobody_better_off():
  x = _images(3)
  y = np.stack([x[2], np.full_like(x[0], np.nan), x[0]])
  np.testing.assert_array_equal(metrics.match(x, y), [2, 1, 0])


@pytest.mark.parametrize(
  ("successes", "trials", "low", "high"),
  [  # Newcombe 1998, table I, method 3
    (81, 263, 0.2553, 0.3662),
    (15, 148, 0.0624, 0.1605),
    (0, 20, 0.0, 0.1611),
    (1, 29, 0.0061, 0.1718),
  ],
)
def test_wilson_is_the_published_table(successes, trials, low, high):
  rate = metrics.wilson(successes, trials)
  assert rate.rate == successes / trials
  np.testing.assert_allclose((rate.low, rate.high), (low, high), atol=5e-5)


@given(trials=st.integers(1, 500), data=st.data())
def test_wilson_holds_its_proportion_and_is_symmetric(trials, data):
  successes = data.draw(st.integers(0, trials))
  rate = metrics.wilson(successes, trials)
  other = metrics.wilson(trials - successes, trials)
  assert 0 <= rate.low <= rate.rate <= rate.high <= 1
  np.testing.assert_allclose(rate.low, 1 - other.high, atol=1e-12)


@pytest.mark.parametrize(("successes", "trials"), [(3, 2), (-1, 2), (0, 0)])
def test_wilson_refuses_impossible_counts(successes, trials):
  with pytest.raises(ValueError, match="trials"):
    metrics.wilson(successes, trials)


def test_success_begins_at_twenty_db():
  rate = metrics.success_rate([19.99, 20.0, 35.0, 3.0])
  assert rate[:3] == (2, 4, 0.5)


def test_summary_of_known_values():
  assert metrics.summarize(
    np.array([10.0, 30.0, 20.0]), np.array([0.1, 0.9, 0.4])
  ) == {
    "psnr_db_median": 20.0,
    "psnr_db_max": 30.0,
    "ssim_median": 0.4,
    "success_rate": 2 / 3,
  }


def test_reidentified_is_the_nearest_neighbour_of_scipy():
  x, pool = _images(5, (4, 4, 1)), _images(60, (4, 4, 1), seed=1)
  guess = np.clip(x + np.random.default_rng(2).normal(0, 0.4, x.shape), 0, 1)
  everything = np.concatenate([x, pool])
  distance = scipy.spatial.distance.cdist(
    guess.reshape(5, -1), everything.reshape(65, -1)
  )
  expected = distance.argmin(axis=1) == np.arange(5)
  assert 0 < expected.sum() < 5
  np.testing.assert_array_equal(metrics.reidentified(x, guess, pool), expected)


def test_reidentified_looks_at_no_more_candidates_than_it_says():
  x = np.full((1, 2, 2, 1), 0.5)
  pool = np.zeros((metrics.MAX_CANDIDATES, 2, 2, 1))
  pool[-1] = 0.6  # nearer, and the first one past the limit
  guess = np.full((1, 2, 2, 1), 0.6)
  assert metrics.reidentified(x, guess, pool).all()
  assert not metrics.reidentified(x, guess, pool[1:]).any()


def test_reidentified_survives_a_copy_in_the_pool():
  x = _images(2, (4, 4, 1))
  assert metrics.reidentified(
    x, x, np.concatenate([x, _images(9, (4, 4, 1), 1)])
  ).all()


def test_reidentified_wants_something_to_tell_apart():
  x = _images(1, (4, 4, 1))
  with pytest.raises(ValueError, match="1 candidates"):
    metrics.reidentified(x, x, x[:0])


def test_references_are_their_closed_forms():
  x = _smooth(5, 28, 3)
  mean = x.mean(axis=0)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    got = metrics.references(x, mean, np.random.default_rng(0))

  def db(errors):
    return np.median(-10 * np.log10(errors))

  variance = x.var(axis=(1, 2)).mean(axis=-1)
  expected = {
    "mean_image": db(((x - mean) ** 2).mean(axis=(1, 2, 3))),
    "grey": db(((x - 0.5) ** 2).mean(axis=(1, 2, 3))),
    "best_constant": db(variance),
  }
  for name, value in expected.items():
    np.testing.assert_allclose(got[name]["psnr_db_median"], value)
  # E (x - u)^2 = (x - 1/2)^2 + 1/12 for u uniform on [0, 1].
  noise = ((x - 0.5) ** 2).mean(axis=(1, 2, 3)) + 1 / 12
  np.testing.assert_allclose(
    got["noise"]["psnr_db_median"], db(noise), atol=0.2
  )
  assert got["best_constant"]["psnr_db_median"] >= got["grey"]["psnr_db_median"]


def test_noise_comes_from_the_generator_alone():
  x = _images()
  one, same, other = (
    metrics.reference_images(x, x[0], np.random.default_rng(s))["noise"]
    for s in (7, 7, 8)
  )
  np.testing.assert_array_equal(one, same)
  assert np.any(one != other)
