"""Products of float32 numbers in float32, on devices that would round them.

By default JAX multiplies float32 matrices in TF32 on recent GPUs, with an error
of 3e-4 of the product's length, and in bfloat16 on TPUs. Then plans would not
agree to float32 rounding, and a search would stop short of what an adversary
with patience finds.
"""

import contextlib

import jax


def chosen() -> str | None:
  """The precision of products here and now; None for the device's default."""
  return jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]


def products() -> contextlib.AbstractContextManager:
  """A context in which products are those of float32.

  Who has chosen (`JAX_DEFAULT_MATMUL_PRECISION=tensorfloat32`) has it their
  way. On a CPU, where products are exact by default, nothing is changed.
  """
  if chosen() is not None or jax.default_backend() == "cpu":
    return contextlib.nullcontext()
  return jax.default_matmul_precision("float32")
