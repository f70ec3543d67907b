"""A Flax model of your own, trained under two defences and attacked.

    python examples/own_model.py

A client takes one step on one image, the update that is easiest to take back.

Linen modules go in as they are: `classes` and `conv` are set by the package
(`conv` may be ignored). An NNX module is wrapped by `nnx.bridge.to_linen`.
"""

import sys

from flax import linen as nn
from flax import nnx

from experiments import config, main
from mpqfl_jax import models


class Linen(nn.Module):
  classes: int
  conv: str

  @nn.compact
  def __call__(self, x):
    x = nn.sigmoid(nn.Dense(64)(x.reshape(len(x), -1)))
    return nn.Dense(self.classes)(x)


class Nnx(nnx.Module):
  def __init__(self, classes, rngs):
    self.out = nnx.Linear(784, classes, rngs=rngs)

  def __call__(self, x):
    return self.out(x.reshape(len(x), -1))


wrapped = lambda classes, conv: nnx.bridge.to_linen(Nnx, classes)  # noqa: E731
models.MODELS |= {"linen": (Linen, "two layers"), "nnx": (wrapped, "one layer")}
runs = sys.argv[1] if sys.argv[1:] else "runs"
for name in ("linen", "nnx"):
  values = config.make(
    model=name,
    num_clients=300,
    cohort_size=30,
    rounds=3,
    batch_size=1,
    local_steps=1,
    defense=("none", "int4"),
    attack=("dlg(iterations=100)",),
    output_dir=f"{runs}/{name}",
    overwrite=True,
  )
  main.run(values)
