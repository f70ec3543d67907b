"""Rates are those of the messages, distortions those of the decoded update."""

import jax
import jax.numpy as jnp
import numpy as np

from mpqfl_jax import precision, specs
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


def test_every_codec_is_in_the_figure():
  lines = distortion.panels(10_000).values()
  shown = {
    specs.parse(spec)[0]
    for curves in lines
    for codecs in curves.values()
    for spec in codecs
  }
  # What sends all or nothing, and widths between those that are shown.
  rest = {"none", "float32", "withheld", "int7"}
  assert shown == set(precision.CODECS) - rest
  for curves in lines:
    for codecs in curves.values():
      for spec in codecs:
        name, options = specs.parse(spec)
        precision.make(name, UPDATE, **options)


def test_every_curve_is_drawn():
  curves = {
    title: {
      label: [distortion.Point(c, 1.0 + i, 6.0 * i) for i, c in enumerate(all_)]
      for label, all_ in lines.items()
    }
    for title, lines in distortion.panels(10_000).items()
  }
  fig = distortion.draw(curves)
  fig.canvas.draw()
  assert [ax.get_title(loc="left") for ax in fig.axes] == list(curves)
  for ax, lines in zip(fig.axes, curves.values(), strict=True):
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert len(labels) == len(lines)
    for label, name in zip(labels, lines, strict=True):
      assert label == name or label.startswith(f"{name} (")
    # None runs out of its panel.
    frame = ax.get_window_extent()
    legend = ax.get_legend().get_window_extent()
    assert legend.x1 <= frame.x1 and legend.y0 >= frame.y0


def test_what_lies_beyond_the_axes_is_told():
  points = [
    distortion.Point("int8", 8.0, 40.0),
    distortion.Point("int16", 16.0, 89.0),
    distortion.Point("randomk", 1.0, -20.0),
  ]
  fig = distortion.draw(
    {"all": {"symmetric": points}, "none": {"a": points[:1]}}
  )
  (label,) = fig.axes[0].get_legend().get_texts()
  assert label.get_text() == "symmetric (16 bits: 89 dB, 1 bits: -20 dB)"
