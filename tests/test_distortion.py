"""Rates are those of the messages, distortions those of the decoded update."""

import jax
import jax.numpy as jnp
import numpy as np

from mpqfl_jax.report import distortion

UPDATE = {
  "dense1": {
    "bias": jax.random.normal(jax.random.key(0), (50,)),
    "kernel": jax.random.normal(jax.random.key(1), (200, 50)),
  }
}


def test_rate_and_distortion_in_closed_form():
  points = distortion.measure(
    UPDATE, ["none", "int8", "int4", "sign"], jax.random.key(2)
  )
  exact, fine, coarse, sign = points
  assert exact.snr_db == np.inf and 32 < exact.bits < 32.1
  assert 8 < fine.bits < 8.1 and 4 < coarse.bits < 4.1 and 1 < sign.bits < 1.1
  # Rounding to the nearest loses a twelfth of the squared step.
  x = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(UPDATE)])
  for point, levels in ((fine, 127), (coarse, 7)):
    steps = [
      (leaf.size, float(jnp.abs(leaf).max()) / levels)
      for leaf in jax.tree.leaves(UPDATE)
    ]
    error = sum(n * s**2 / 12 for n, s in steps)
    np.testing.assert_allclose(
      point.snr_db, 10 * np.log10(np.sum(x**2) / error), atol=0.3
    )
  # Signs of a normal keep 2 / pi of the energy.
  np.testing.assert_allclose(
    sign.snr_db, -10 * np.log10(1 - 2 / np.pi), atol=0.15
  )


def test_every_curve_is_drawn():
  curves = {
    label: [distortion.Point(c, 2.0**i, 6.0 * i) for i, c in enumerate(codecs)]
    for label, codecs in distortion.CURVES.items()
  }
  fig = distortion.draw(curves)
  fig.canvas.draw()
  labels = [text.get_text() for text in fig.legends[0].get_texts()]
  assert labels == list(curves)
