"""A prior of images learned by denoising them, as an energy for searches.

Images blurred by noise of deviation s have a density whose logarithm has the
gradient (D(y) - y) / s^2 at y, where D(y) is the mean of the images that may
lie behind y (Vincent 2011, section 4). Here that density is the one of a
Gaussian, `coordinates.fitted`, times exp(-|n(y)|^2 / 2), where n is a small
convolutional network, trained so that the gradient denoises (a gradient step
denoiser: Hurault et al. 2022, whose energy is the distance to a network's
output). Since it is a proper energy, line searches work, and so does the choice
of the best restart by its value.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import auto as tqdm

from mpqfl_jax import layers
from mpqfl_jax.attacks import coordinates
from mpqfl_jax.types import Array, Key, PyTree

# The deviations that it is trained for; pixels lie in [0, 1].
LEAST, MOST = 0.03, 1.0
_CHANNELS = 32
_DEPTH = 4
_BATCH = 32
_RATE = 4e-3
# Steps between two moves of the progress bar.
_CHUNK = 50


def init(key: Key, channels: int) -> PyTree:
  """Weights of an untrained network for images of so many channels.

  A list of layers: kernel [3, 3, in, out], bias [out] and what moves and scales
  the output with the logarithm of the blur, [out] each.
  """
  # Squares of 2x2 pixels are channels, of the image and of its noise.
  sizes = [2 * 4 * channels] + [_CHANNELS] * _DEPTH
  found = []
  for i, k in enumerate(jax.random.split(key, _DEPTH)):
    # A large start would be a steep wall, which training flattens to nothing.
    scale = np.sqrt(1 / (3 * 9 * sizes[i])) * (0.3 if i == _DEPTH - 1 else 1.0)
    kernel = scale * jax.random.normal(k, (3, 3, sizes[i], sizes[i + 1]))
    zeros = jnp.zeros(_CHANNELS)
    found.append(
      {"kernel": kernel, "bias": zeros, "move": zeros, "gain": zeros}
    )
  return found


def _squares(x: Array) -> Array:
  """[n, h, w, c], padded to even sides -> [n, h / 2, w / 2, 4 c]."""
  x = jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)))
  n, height, width, channels = x.shape
  x = x.reshape(n, height // 2, 2, width // 2, 2, channels)
  x = x.transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(n, height // 2, width // 2, 4 * channels)


def energy(
  weights: PyTree, prior: coordinates.Coordinates, z: Array, blur: Array
) -> Array:
  """Minus the log-density of blurred images, up to a constant.

  Args:
    weights: as from `init` or `fitted`.
    prior: the Gaussian that the network corrects.
    z: [n, *prior.shape], coordinates of the blurred images.
    blur: [n], deviation of the noise in each pixel.

  Returns:
    [n] float32.
  """
  convolve = layers.convolution(layers.ATTACK_FORM)
  deviation = blur[:, None, None, None]
  square = jnp.square(prior.deviation)
  kept = z * (square / (square + jnp.square(deviation)))
  gaussian = 0.5 * jnp.sum(z * kept, (1, 2, 3))
  clean = prior.to_images(kept)
  noise = (prior.to_images(z) - clean) / deviation
  h = jnp.concatenate([_squares(noise), _squares(2 * clean - 1)], -1)
  level = jnp.log(deviation / np.sqrt(LEAST * MOST))
  for i, layer in enumerate(weights):
    h = convolve(
      h, layer["kernel"], (1, 1), "SAME", dimension_numbers=layers.NHWC
    )
    h = h * (1 + layer["gain"] * level) + layer["bias"] + layer["move"] * level
    if i < len(weights) - 1:
      h = jax.nn.silu(h)
  return gaussian + 0.5 * jnp.sum(jnp.square(h), (1, 2, 3))


def denoise(
  weights: PyTree, prior: coordinates.Coordinates, z: Array, blur: Array
) -> Array:
  """The mean of the images that may lie behind blurred ones.

  Arguments as of `energy`.

  Returns:
    [n, *prior.shape], its coordinates.
  """
  slope = jax.grad(lambda z: jnp.sum(energy(weights, prior, z, blur)))(z)
  # A unit step of a coordinate is `deviation` long, in pixels.
  step = jnp.square(blur)[:, None, None, None] / jnp.square(prior.deviation)
  return z - step * slope


def fitted(
  shape: tuple[int, int, int], auxiliary: np.ndarray, steps: int
) -> PyTree:
  """Weights trained on auxiliary images.

  They depend on the arguments alone and are kept for the next call with the
  same. Colour images, which are photographs here, are mirrored at random.

  Args:
    shape: of an image, (height, width, channels).
    auxiliary: [images, height, width, channels] uint8.
    steps: of training.

  Raises:
    UserError: see `coordinates.check`.
  """
  coordinates.check(shape, auxiliary)
  # Also where a search that uses it is being compiled.
  with jax.ensure_compile_time_eval():
    return _fitted(shape, auxiliary.tobytes(), steps)


@functools.lru_cache(maxsize=3)
def _fitted(shape: tuple[int, int, int], pixels: bytes, steps: int) -> PyTree:
  auxiliary = np.frombuffer(pixels, np.uint8).reshape(-1, *shape)
  prior = coordinates.fitted(shape, auxiliary)
  mirrored = shape[-1] == 3
  optimizer = optax.adam(optax.cosine_decay_schedule(_RATE, steps))

  def loss(weights, x, noise, blur):
    deviation = blur[:, None, None, None]
    z = prior.from_images(x + deviation * noise)
    apart = denoise(weights, prior, z, blur) - prior.from_images(x)
    error = jnp.mean(jnp.square(apart * prior.deviation), (1, 2, 3))
    # Between what makes all blurs count alike and what makes all pixels.
    return jnp.mean(error / blur**1.5)

  def step(pool, carry, key):
    weights, state = carry
    keys = jax.random.split(key, 4)
    rows = jax.random.randint(keys[0], (_BATCH,), 0, len(pool))
    x = pool[rows].astype(jnp.float32) / 255
    if mirrored:
      turned = jax.random.bernoulli(keys[1], 0.5, (_BATCH, 1, 1, 1))
      x = jnp.where(turned, x[:, :, ::-1], x)
    noise = jax.random.normal(keys[2], x.shape)
    low, high = np.log(LEAST), np.log(MOST)
    blur = jnp.exp(
      jax.random.uniform(keys[3], (_BATCH,), jnp.float32, low, high)
    )
    slope = jax.grad(loss)(weights, x, noise, blur)
    change, state = optimizer.update(slope, state, weights)
    return (optax.apply_updates(weights, change), state), None

  @jax.jit
  def advance(pool, carry, keys):
    return jax.lax.scan(functools.partial(step, pool), carry, keys)[0]

  first, rest = jax.random.split(jax.random.key(0))
  weights = init(first, shape[-1])
  carry = weights, optimizer.init(weights)
  keys = jax.random.split(rest, steps)
  pool = jnp.asarray(auxiliary)
  with tqdm.tqdm(
    total=steps, desc="learning a prior", disable=None, leave=False
  ) as bar:
    for start in range(0, steps, _CHUNK):
      carry = jax.block_until_ready(
        advance(pool, carry, keys[start : start + _CHUNK])
      )
      bar.update(min(_CHUNK, steps - start))
  return jax.device_get(carry[0])
