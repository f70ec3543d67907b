"""An image from a gradient that came from somewhere else, such as PyTorch.

    python examples/own_gradient.py

PyTorch keeps a dense kernel as [out, in]; ours are [in, out]. A gradient is an
update of one SGD step at rate 1.
"""

import jax
import numpy as np

from mpqfl_jax import attacks, datasets, metrics, models
from mpqfl_jax.types import Observation

data = datasets.load("mnist_sample")
model = models.make("mlp", (28, 28, 1), 10, data.mean, data.std)
params = jax.device_get(model.init(jax.random.key(0)))
x, y = np.float32(data.x_test[:1] / 255), data.y_test[:1]
try:
  import torch

  net = torch.nn.Sequential(torch.nn.Flatten())
  for name in ("dense1", "dense2", "dense3"):
    layer = torch.nn.Linear(*params[name]["kernel"].shape)
    layer.weight.data = torch.tensor(params[name]["kernel"].T)
    layer.bias.data = torch.tensor(params[name]["bias"])
    net.extend([layer, torch.nn.ReLU()])
  out = net[:-1](torch.tensor((x - data.mean) / data.std))
  torch.nn.functional.cross_entropy(out, torch.tensor(y).long()).backward()
  dense = [(layer.weight.grad, layer.bias.grad) for layer in net[1:-1:2]]
  gradient = {
    f"dense{i}": {"kernel": kernel.numpy().T, "bias": bias.numpy()}
    for i, (kernel, bias) in enumerate(dense, start=1)
  }
except ImportError:
  gradient = jax.grad(lambda p: models.cross_entropy(model, p, x, y).mean())(
    params
  )

seen = Observation(params, gradient, None, None, np.float32(1))
batched = jax.tree.map(lambda leaf: np.asarray(leaf)[None], seen)
found = attacks.run(attacks.make("analytic", model), batched, jax.random.key(1))
print(f"PSNR {metrics.psnr_db(x, found.x[0])[0]:.1f} dB")
