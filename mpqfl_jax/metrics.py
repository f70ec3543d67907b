"""How near a reconstruction comes to the private image.

Images are [..., height, width, channels], floats; both sides are clipped to
[0, 1] first, because an attacker would clip too. Nothing here is ever NaN: a
pixel of a reconstruction that is not finite (a diverged attack) counts as
wrong by 1, the largest error there is, and such an image has an SSIM of 0.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.optimize
import skimage.metrics

# The PSNR from which on a reconstruction counts as a success.
SUCCESS_DB = 20.0
# Keeps an exact reconstruction finite, hence valid JSON. Half a step of an
# 8-bit image is 59 dB already.
MAX_DB = 100.0
# Re-identification searches among this many images at most.
MAX_CANDIDATES = 1000
# The 97.5 % quantile of the standard normal distribution.
_Z95 = 1.959963984540054

Images = npt.NDArray[np.floating[Any]]
Values = npt.NDArray[np.float64]


class Rate(NamedTuple):
  """A proportion with its 95 % confidence interval.

  Attributes:
    successes, trials: the counts.
    rate: successes / trials.
    low, high: the ends of the Wilson score interval.
  """

  successes: int
  trials: int
  rate: float
  low: float
  high: float


def mse(original: Images, reconstruction: Images) -> Values:
  """Mean squared error of each image.

  Args:
    original, reconstruction: [..., height, width, channels], clipped to
      [0, 1]; leading axes broadcast.

  Returns:
    [...], float64 in [0, 1].
  """
  finite = np.isfinite(np.asarray(reconstruction))
  x = np.clip(np.asarray(original, np.float64), 0, 1)
  y = np.clip(np.asarray(reconstruction, np.float64), 0, 1)
  return np.mean(np.where(finite, np.square(x - y), 1.0), axis=(-3, -2, -1))


def psnr_db(original: Images, reconstruction: Images) -> Values:
  """Peak signal-to-noise ratio of each image, for a peak of 1.

  Args:
    original, reconstruction: as for `mse`.

  Returns:
    [...], float64 in [0, MAX_DB], in dB.
  """
  error = np.maximum(mse(original, reconstruction), 10 ** (-MAX_DB / 10))
  return -10 * np.log10(error)


def ssim(original: Images, reconstruction: Images) -> Values:
  """Structural similarity of each image, with Wang et al.'s Gaussian window.

  Args:
    original, reconstruction: [n, height, width, channels], clipped to [0, 1];
      at least 11 pixels high and wide.

  Returns:
    [n], float64 in [-1, 1].

  Source: Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment: from
  error visibility to structural similarity", 2004, section III-C.
  """
  out = np.zeros(len(original))
  pairs = zip(original, reconstruction, strict=True)
  for i, (x, y) in enumerate(pairs):
    if np.all(np.isfinite(y)):
      out[i] = skimage.metrics.structural_similarity(
        np.clip(np.asarray(x, np.float64), 0, 1),
        np.clip(np.asarray(y, np.float64), 0, 1),
        data_range=1.0,
        channel_axis=-1,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
      )
  return out


# Exponents of the scales, fine to coarse (Wang et al. 2003, section 4).
_SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
# Side of the Gaussian window, pixels.
_WINDOW = 11


def ms_ssim(original: Images, reconstruction: Images) -> Values:
  """Multi-scale structural similarity of each image.

  Contrast and structure are compared at every scale, luminance at the coarsest
  only; from one scale to the next, images are averaged over 2x2 pixels. Of the
  five scales those count that the window fits into, two for 28 or 32 pixels,
  with exponents that are scaled to sum to 1. A scale whose structures are
  anticorrelated makes the index 0.

  Args:
    original, reconstruction: [n, height, width, channels], clipped to [0, 1];
      at least 11 pixels high and wide.

  Returns:
    [n], float64 in [0, 1].

  Source: Wang, Simoncelli, Bovik, "Multi-scale structural similarity for image
  quality assessment", 2003, equation 7.
  """
  out = np.zeros(len(original))
  side = min(original.shape[1:3])
  fit = sum(side // 2**j >= _WINDOW for j in range(len(_SCALES)))
  exponents = np.array(_SCALES[:fit]) / sum(_SCALES[:fit])
  pairs = zip(original, reconstruction, strict=True)
  for i, (x, y) in enumerate(pairs):
    if not np.all(np.isfinite(y)):
      continue
    x = np.clip(np.asarray(x, np.float64), 0, 1)
    y = np.clip(np.asarray(y, np.float64), 0, 1)
    product = np.ones(x.shape[-1])
    for j, exponent in enumerate(exponents):
      values = _similarity(x, y, luminance=j == fit - 1)
      product *= np.maximum(values, 0) ** exponent
      x, y = _halve(x), _halve(y)
    out[i] = product.mean()
  return out


def _similarity(x: Images, y: Images, luminance: bool) -> Values:
  """[channels]: SSIM, or its contrast and structure alone."""
  # A large constant drowns the means, so that the luminance term becomes 1.
  k1 = 0.01 if luminance else 1e8
  return np.array(
    [
      skimage.metrics.structural_similarity(
        x[..., c],
        y[..., c],
        data_range=1.0,
        K1=k1,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
      )
      for c in range(x.shape[-1])
    ]
  )


def _halve(x: Images) -> Images:
  """Means over 2x2 pixels; a last odd row or column is left out."""
  rows, columns = x.shape[0] // 2, x.shape[1] // 2
  x = x[: 2 * rows, : 2 * columns]
  return x.reshape(rows, 2, columns, 2, -1).mean((1, 3))


def label_accuracy(
  truth: npt.NDArray[np.integer[Any]], guess: npt.NDArray[np.integer[Any]]
) -> float:
  """Share of an update's labels that were found, in whatever order.

  Args:
    truth, guess: [n], labels of the images of one update.

  Source: Wainakh et al., "User-level label leakage from gradients in federated
  learning", 2022, section 5.1 (attack success rate).
  """
  classes = np.union1d(truth, guess)
  counts = ((labels[:, None] == classes).sum(0) for labels in (truth, guess))
  return float(np.minimum(*counts).sum() / len(truth))


def match(
  original: Images, reconstruction: Images
) -> npt.NDArray[np.integer[Any]]:
  """Pairs a batch's reconstructions, which come in any order, with originals.

  Args:
    original, reconstruction: [n, height, width, channels].

  Returns:
    [n], a permutation: `reconstruction[match(...)]` lies in the order of
    `original`, and no other order has a smaller summed squared error.
  """
  cost = np.stack([mse(x[None], reconstruction) for x in original])
  return scipy.optimize.linear_sum_assignment(cost)[1]


def wilson(successes: int, trials: int) -> Rate:
  """A proportion with Wilson's 95 % score interval.

  Args:
    successes: between 0 and `trials`.
    trials: at least 1.

  Source: Wilson, "Probable inference, the law of succession, and statistical
  inference", 1927; Newcombe, "Two-sided confidence intervals for the single
  proportion", 1998, method 3.
  """
  if not 0 <= successes <= trials or trials < 1:
    raise ValueError(f"{successes} successes in {trials} trials")
  p, z2 = successes / trials, _Z95**2
  centre = (p + z2 / (2 * trials)) / (1 + z2 / trials)
  spread = p * (1 - p) / trials + z2 / (4 * trials**2)
  half = _Z95 * spread**0.5 / (1 + z2 / trials)
  # Rounding must not push the ends past the proportion at 0 and at 1.
  low = 0.0 if successes == 0 else centre - half
  high = 1.0 if successes == trials else centre + half
  return Rate(successes, trials, p, low, high)


def success_rate(psnr: npt.ArrayLike) -> Rate:
  """Share of images reconstructed to `SUCCESS_DB` or better.

  Args:
    psnr: [n], dB.
  """
  values = np.asarray(psnr)
  return wilson(int(np.sum(values >= SUCCESS_DB)), values.size)


def summarize(psnr: Values, ssim: Values) -> dict[str, float]:
  """What `summary.json` says of one attack on one defence.

  Args:
    psnr: [n], dB.
    ssim: [n].
  """
  return {
    "psnr_db_median": float(np.median(psnr)),
    "psnr_db_max": float(np.max(psnr)),
    "ssim_median": float(np.median(ssim)),
    "success_rate": success_rate(psnr).rate,
  }


def reidentified(
  original: Images, reconstruction: Images, pool: Images
) -> npt.NDArray[np.bool_]:
  """Whether the original is the reconstruction's nearest neighbour in L2.

  The candidates are the originals and then the first images of the pool, at
  most `MAX_CANDIDATES` in all; guessing finds one in so many.

  Args:
    original, reconstruction: [n, height, width, channels], in one order.
    pool: [m, height, width, channels], other images of the same data set; one
      that equals the original does no harm.

  Returns:
    [n], bool.
  """
  candidates = np.concatenate([original, pool])[:MAX_CANDIDATES]
  if len(candidates) < max(2, len(original)):
    raise ValueError(f"{len(candidates)} candidates for {len(original)} images")
  found = np.zeros(len(original), bool)
  for i, guess in enumerate(reconstruction):
    distance = mse(candidates, guess[None])
    # A guess at equal distance from everything identifies nothing.
    found[i] = distance[i] <= distance.min() < distance.max()
  return found


def reference_images(
  x: Images, train_mean: Images, rng: np.random.Generator
) -> dict[str, Images]:
  """Guesses that need no attack, which every attack has to beat.

  Args:
    x: [n, height, width, channels] in [0, 1], the attacked images.
    train_mean: [height, width, channels] in [0, 1], mean of the training
      split.
    rng: draws the noise.

  Returns:
    name -> [n, height, width, channels]: the mean image, grey (0.5), the best
    constant (each image's own mean colour, which no attacker is given), and
    uniform noise.
  """
  colour = np.mean(x, axis=(1, 2), keepdims=True)
  return {
    "mean_image": np.broadcast_to(train_mean, x.shape),
    "grey": np.full(x.shape, 0.5),
    "best_constant": np.broadcast_to(colour, x.shape),
    "noise": rng.uniform(size=x.shape),
  }


def references(
  x: Images, train_mean: Images, rng: np.random.Generator
) -> dict[str, dict[str, float]]:
  """Median PSNR and SSIM of `reference_images`, as `summary.json` has them."""
  return {
    name: {
      "psnr_db_median": float(np.median(psnr_db(x, guess))),
      "ssim_median": float(np.median(ssim(x, guess))),
    }
    for name, guess in reference_images(x, train_mean, rng).items()
  }
