"""A codec alone, in somebody else's training loop: an optax transformation.

python examples/codec_in_optax.py
"""

import jax
import jax.numpy as jnp
import optax

from mpqfl_jax import precision

x = jax.random.normal(jax.random.key(0), (256, 20))
y = x @ jnp.linspace(-1, 1, 20)
params = {"w": jnp.zeros(20)}


def loss(params):
  return jnp.mean((x @ params["w"] - y) ** 2)


codec = precision.make("sign", params, error_feedback=True)
optimizer = optax.chain(
  precision.transformation(codec, jax.random.key(1)), optax.sgd(0.05)
)
state = optimizer.init(params)
for _ in range(100):
  updates, state = optimizer.update(jax.grad(loss)(params), state)
  params = optax.apply_updates(params, updates)
payload, _ = codec.encode(jax.random.key(2), params, codec.init(params))
print(f"loss {loss(params):.1e} with {len(codec.pack(payload))} bytes a step")
