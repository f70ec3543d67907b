"""Products of float32 numbers in float32, on devices that would round them.

By default JAX multiplies float32 matrices in TF32 on recent GPUs, with an error
of 3e-4 of the product's length, and in bfloat16 on TPUs. Then plans would not
agree to float32 rounding, and a search would stop short of what an adversary
with patience finds.
"""

from collections.abc import Iterator
import contextlib
from typing import Any

import jax


def chosen() -> str:
  """The precision of products here and now; `default` is the device's own."""
  config: Any = jax.config
  return config.jax_default_matmul_precision or "default"


@contextlib.contextmanager
def products() -> Iterator[None]:
  """A context, or a decorator, under which products are those of float32.

  Who has chosen (`JAX_DEFAULT_MATMUL_PRECISION=tensorfloat32`) has it their
  way. On a CPU, where products are exact by default, nothing is changed.
  """
  if chosen() != "default" or jax.default_backend() == "cpu":
    yield
    return
  with jax.default_matmul_precision("float32"):
    yield
