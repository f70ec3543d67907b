"""Products in float32 where a device would round them."""

import jax
import jax.numpy as jnp

from mpqfl_jax import exact


def _precision():
  """What a product that is traced here asks for."""
  traced = jax.make_jaxpr(lambda a: a @ a)(jnp.ones((2, 2)))
  (product,) = [
    e for e in traced.jaxpr.eqns if e.primitive.name == "dot_general"
  ]
  return product.params["precision"]


def test_a_cpu_is_left_alone():
  with exact.products():
    assert exact.chosen() == "default"
    assert _precision() is None


def test_an_accelerator_is_asked_for_float32(monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  with exact.products():
    assert exact.chosen() == "float32"
    assert set(_precision()) == {jax.lax.Precision.HIGHEST}
  assert exact.chosen() == "default"


def test_who_chose_has_it_their_way(monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  with jax.default_matmul_precision("tensorfloat32"), exact.products():
    assert exact.chosen() == "tensorfloat32"
