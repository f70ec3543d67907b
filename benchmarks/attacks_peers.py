"""The attacks of `benchmarks.attacks` in other packages.

A worker imports its own system and nothing of this package, so that it runs in
the peer's environment. It is given `task.npz`: images, labels, our weights, and
for every image our logits and the norm of our gradient, leaf by leaf. It builds
the model in its framework and attacks only where both are the same there. It
writes `answer.npz` (what was reconstructed) and `answer.json`.
"""

import argparse
from collections.abc import Callable
import copy
from importlib import metadata
import json
import pathlib
import time
from typing import Any

import numpy as np

# Of the largest logit, and of the norm of the whole gradient: float32 sums in
# another order are off by 1e-6 to 1e-5.
TOLERANCE = 1e-3
# (stride, padding) of the convolutions of models that are a stack of them.
_LENET = ((2, 2), (2, 2), (1, 2))
_CNN6 = ((2, 2), (2, 1), (1, 1), (1, 1), (2, 1), (1, 1))
_CNN6_SLOPE = 0.2
_CONVNET_LAYERS, _CONVNET_POOLED = 8, (6, 8)
# An outer iteration of torch's L-BFGS takes up to this many steps.
_LBFGS_STEPS = 20
# Steps of the attack before the timed ones.
_WARM_UP = 4


class Torch:
  """Torch's layers with the task's weights.

  Attributes:
    leaves: our name of a parameter -> the parameter.
  """

  def __init__(self, task: Any):
    self._task = {
      name.removeprefix("params/"): task[name]
      for name in task.files
      if name.startswith("params/")
    }
    self.leaves: dict[str, Any] = {}

  def has(self, layer: str) -> bool:
    """Whether our model has such a layer."""
    return f"{layer}/kernel" in self._task

  def _put(self, parameter: Any, name: str, value: np.ndarray) -> None:
    import torch

    parameter.data = torch.from_numpy(np.ascontiguousarray(value))
    self.leaves[name] = parameter

  def conv(self, name: str, stride: int, padding: int) -> Any:
    """A convolution; ours are (height, width, in, out), theirs (out, in, ..)"""
    from torch import nn

    kernel = self._task[f"{name}/kernel"]
    bias = self._task.get(f"{name}/bias")
    size, _, channels, features = kernel.shape
    layer = nn.Conv2d(
      channels, features, size, stride, padding, bias=bias is not None
    )
    self._put(layer.weight, f"{name}/kernel", kernel.transpose(3, 2, 0, 1))
    if bias is not None:
      self._put(layer.bias, f"{name}/bias", bias)
    return layer

  def norm(self, name: str) -> Any:
    """Batch normalisation; its buffers start as mean 0 and variance 1."""
    from torch import nn

    scale = self._task[f"{name}/scale"]
    layer = nn.BatchNorm2d(len(scale), eps=1e-5)
    self._put(layer.weight, f"{name}/scale", scale)
    self._put(layer.bias, f"{name}/bias", self._task[f"{name}/bias"])
    return layer

  def dense(self, features: tuple[int, int, int], always_bias=False) -> Any:
    """The last layer.

    Args:
      features: (channels, height, width) that were flattened in this order;
        ours are flattened as (height, width, channels).
      always_bias: with a bias of zeros where ours has none.
    """
    from torch import nn

    kernel = self._task["dense1/kernel"]
    bias = self._task.get("dense1/bias")
    channels, height, width = features
    classes = kernel.shape[1]
    has_bias = always_bias or bias is not None
    layer = nn.Linear(len(kernel), classes, bias=has_bias)
    kernel = kernel.reshape(height, width, channels, classes)
    kernel = kernel.transpose(3, 2, 0, 1).reshape(classes, -1)
    self._put(layer.weight, "dense1/kernel", kernel)
    if bias is not None:
      self._put(layer.bias, "dense1/bias", bias)
    elif has_bias:
      nn.init.zeros_(layer.bias)
    return layer


def _shape(layers: list[Any], image: tuple[int, int, int]) -> Any:
  """(channels, height, width) of what the layers make of an image."""
  import torch

  with torch.no_grad():
    net = torch.nn.Sequential(*layers).eval()
    return tuple(net(torch.zeros(1, *image)).shape[1:])


def _lenet_zhu(build: Torch, image: tuple[int, int, int]) -> list[Any]:
  from torch import nn

  layers: list[Any] = []
  for i, (stride, padding) in enumerate(_LENET):
    layers += [build.conv(f"conv{i + 1}", stride, padding), nn.Sigmoid()]
  return [*layers, nn.Flatten(), build.dense(_shape(layers, image))]


def _convnet(build: Torch, image: tuple[int, int, int]) -> list[Any]:
  from torch import nn

  layers: list[Any] = []
  for i in range(1, _CONVNET_LAYERS + 1):
    name = f"conv{i}"
    layers += [build.conv(name, 1, 1), build.norm(f"{name}_norm"), nn.ReLU()]
    if i in _CONVNET_POOLED:
      layers.append(nn.MaxPool2d(3))
  return [*layers, nn.Flatten(), build.dense(_shape(layers, image))]


def _resnet(build: Torch, image: tuple[int, int, int]) -> list[Any]:
  import torch
  from torch import nn

  def conv(name: str, stride: int, padding: int) -> list[Any]:
    return [build.conv(name, stride, padding), build.norm(f"{name}_norm")]

  class Block(nn.Module):
    def __init__(self, name: str):
      super().__init__()
      shrinks = build.has(f"{name}_skip")
      stride = 2 if shrinks else 1
      self.long = nn.Sequential(
        *conv(f"{name}_conv1", stride, 1),
        nn.ReLU(),
        *conv(f"{name}_conv2", 1, 1),
      )
      skip = conv(f"{name}_skip", stride, 0) if shrinks else [nn.Identity()]
      self.skip = nn.Sequential(*skip)

    def forward(self, x):
      return torch.relu(self.skip(x) + self.long(x))

  layers = [*conv("block0_conv1", 1, 1), nn.ReLU()]
  number = 1
  while build.has(f"block{number}_conv1"):
    layers.append(Block(f"block{number}"))
    number += 1
  layers.append(nn.AdaptiveAvgPool2d(1))
  return [*layers, nn.Flatten(), build.dense(_shape(layers, image))]


def _cnn6(build: Torch, image: tuple[int, int, int]) -> list[Any]:
  """In the order of modules that breaching's R-GAP walks back through.

  It solves for several classes only where the last layer has a bias, so that
  it is given one of zeros, and the bias's gradient beside those that we get.
  """
  from torch import nn

  layers: list[Any] = []
  for i, (stride, padding) in enumerate(_CNN6):
    layers += [build.conv(f"conv{i + 1}", stride, padding)]
    layers += [nn.LeakyReLU(_CNN6_SLOPE)]
  dense = build.dense(_shape(layers, image), always_bias=True)
  return [*layers[:-1], nn.Flatten(), layers[-1], dense]


MODELS: dict[str, Callable[[Torch, tuple[int, int, int]], list[Any]]] = {
  "lenet_zhu": _lenet_zhu,
  "convnet": _convnet,
  "resnet20": _resnet,
  "resnet18": _resnet,
  "cnn6": _cnn6,
}
# Our name of an attack -> breaching's configuration, models that we compare on.
_SEARCHED = ("lenet_zhu", "convnet", "resnet20", "resnet18")
BREACHING = {
  "dlg": ("deepleakage", _SEARCHED),
  "inverting_gradients": ("invertinggradients", _SEARCHED),
  "rgap": ("rgap", ("cnn6",)),
}


def torch_model(name: str, task: Any) -> tuple[Any, dict[str, Any]]:
  """The model in inference mode, and its parameters by our names.

  Args:
    name: one of `MODELS`.
    task: what `task.npz` holds.
  """
  import torch

  height, width, channels = task["x"].shape[1:]
  build = Torch(task)
  layers = MODELS[name](build, (channels, height, width))
  return torch.nn.Sequential(*layers).eval(), build.leaves


def check(
  index: int, task: Any, logits: np.ndarray, norms: dict[str, float]
) -> None:
  """Refuses to compare where the peer's model is not ours.

  Args:
    index: of the image.
    task: what `task.npz` holds.
    logits: [classes], the peer's.
    norms: our name of a leaf -> norm of the peer's gradient.

  Raises:
    SystemExit: logits or gradient are off by more than `TOLERANCE`.
  """

  def refuse(what: str, error: float) -> None:
    raise SystemExit(
      f"image {index}: the peer's {what} off by {error:.2g}, and at most"
      f" {TOLERANCE:g} is expected: its model is not ours."
    )

  want = task["logits"][index]
  error = np.max(np.abs(logits - want)) / np.max(np.abs(want))
  if not error < TOLERANCE:
    refuse("logits are", error)
  ours = {
    name.removeprefix("norm/"): float(task[name][index])
    for name in task.files
    if name.startswith("norm/")
  }
  if ours.keys() != norms.keys():
    names = ", ".join(sorted(ours.keys() ^ norms.keys()))
    raise SystemExit(f"leaves of one system's gradient only: {names}")
  whole = np.sqrt(sum(norm**2 for norm in ours.values()))
  for name, norm in norms.items():
    error = abs(norm - ours[name]) / whole
    if not error < TOLERANCE:
      refuse(f"gradient of {name} is", error)


def run_breaching(args: argparse.Namespace, folder: pathlib.Path) -> None:
  """Geiping's breaching, by the configuration that it has for the attack."""
  import breaching
  import omegaconf
  import torch

  torch.set_num_threads(args.threads)
  if args.gpu and not torch.cuda.is_available():
    raise SystemExit("--gpu: torch sees no GPU here")
  device = torch.device("cuda" if args.gpu else "cpu")
  # As ours: convolutions on a GPU are in TF32 otherwise.
  torch.backends.cudnn.allow_tf32 = False
  torch.backends.cudnn.benchmark = True  # as breaching's own scripts

  class Counted(torch.nn.CrossEntropyLoss):
    calls = 0  # of the class, for attackers compute with a copy

    def forward(self, *a):
      Counted.calls += 1
      return super().forward(*a)

  task = np.load(folder / "task.npz")
  height, width, channels = task["x"].shape[1:]
  net, leaves = torch_model(args.model, task)
  net.to(device)
  cfg = breaching.get_attack_config(BREACHING[args.attack][0])
  if cfg.get("regularization") and channels != 3:
    raise SystemExit(f"breaching's {args.attack} is for images of 3 channels")
  setup = {"device": device, "dtype": torch.float}
  torch.manual_seed(args.seed)
  loss_fn = Counted()

  center, spread = ([float(v) for v in task[k]] for k in ("mean", "std"))
  known = omegaconf.OmegaConf.create(
    {
      "modality": "vision",
      "task": "classification",
      "classes": task["logits"].shape[1],
      "shape": [channels, height, width],
      "normalize": True,
      "mean": center,
      "std": spread,
    }
  )
  mean = torch.tensor(center)[None, :, None, None]
  std = torch.tensor(spread)[None, :, None, None]

  def attack(payload, shared, iterations: int) -> tuple[Any, float]:
    settings = copy.deepcopy(cfg)
    if iterations:
      inner = _LBFGS_STEPS if cfg.optim.optimizer == "L-BFGS" else 1
      settings.optim.max_iterations = -(-iterations // inner)
    begin = time.perf_counter()
    attacker = breaching.attacks.prepare_attack(net, loss_fn, settings, setup)
    answer, _ = attacker.reconstruct([payload], [shared], {}, dryrun=False)
    found = answer["data"].detach().cpu()  # waits for the GPU
    return found, time.perf_counter() - begin

  found, seconds, warming, steps = [], 0.0, 0.0, 0
  for i, (image, label) in enumerate(zip(task["x"], task["y"], strict=True)):
    x = (torch.tensor(image.transpose(2, 0, 1))[None] - mean) / std
    x, y = x.to(device), torch.tensor([int(label)], device=device)
    parameters = list(net.parameters())
    logits = net(x)
    gradients = torch.autograd.grad(loss_fn(logits, y), parameters)
    norm = {
      id(p): float(g.norm()) for p, g in zip(parameters, gradients, strict=True)
    }
    check(
      i,
      task,
      logits[0].detach().cpu().numpy(),
      {name: norm[id(p)] for name, p in leaves.items()},
    )
    payload = {
      "parameters": [p.detach() for p in parameters],
      # Public statistics, so that normalisation stays in inference mode.
      "buffers": list(net.buffers()),
      "metadata": known,
    }
    shared = {
      "gradients": [g.detach() for g in gradients],
      "buffers": None,
      "metadata": {
        "num_data_points": 1,
        "labels": y if args.labels_known else None,
        "local_hyperparams": None,
      },
    }
    if i == 0 and "optim" in cfg:
      # TorchScript compiles in its first calls.
      _, warming = attack(payload, shared, _WARM_UP)
      # Small layers are slower where threads have to wait for each other.
      trials = {}
      for threads in () if args.gpu else dict.fromkeys((1, args.threads)):
        torch.set_num_threads(threads)
        _, trials[threads] = attack(payload, shared, _WARM_UP)
      if trials:
        torch.set_num_threads(min(trials, key=lambda n: trials[n]))
    Counted.calls = 0
    z, taken = attack(payload, shared, args.iterations)
    seconds += taken
    # A search looks at its result once more; a closed form never asks.
    steps += max(Counted.calls - 1, 1)
    z = z * std + mean
    found.append(z[0].permute(1, 2, 0).clip(0, 1).numpy())
  finish(
    folder,
    np.stack(found),
    iterations=steps / len(found),
    seconds=seconds,
    compile_seconds=warming,
    packages=("breaching", "torch"),
    threads=None if args.gpu else torch.get_num_threads(),
    device=torch.cuda.get_device_name() if args.gpu else None,
  )


def finish(
  folder: pathlib.Path,
  x: np.ndarray,
  *,
  iterations: float,
  seconds: float,
  compile_seconds: float,
  packages: tuple[str, ...],
  **more: Any,
) -> None:
  """Writes what the parent reads.

  Args:
    folder: where `task.npz` is.
    x: [images, height, width, channels] in [0, 1], what was found.
    iterations: steps an image, mean.
    seconds: of all images, compilation excluded.
    compile_seconds: of compilation, or of a short attack before the others.
    packages: whose versions are told.
    **more: other entries of the row.
  """
  np.savez(folder / "answer.npz", x=x)
  versions = [f"{name} {metadata.version(name)}" for name in packages]
  answer = {
    "iterations": float(iterations),
    "seconds": float(seconds),
    "compile_seconds": float(compile_seconds),
    "version": ", ".join(versions),
    **more,
  }
  (folder / "answer.json").write_text(json.dumps(answer))


PEERS = {"breaching": run_breaching}
# peer -> our name of an attack -> models that it is compared on.
SUPPORTED = {
  "breaching": {attack: models for attack, (_, models) in BREACHING.items()}
}


def main() -> None:
  """Runs one peer's attack; started by `benchmarks.attacks`."""
  parser = argparse.ArgumentParser()
  parser.add_argument("peer", choices=PEERS)
  parser.add_argument("folder", type=pathlib.Path)
  parser.add_argument("--attack", choices=BREACHING)
  parser.add_argument("--model", choices=MODELS)
  parser.add_argument("--iterations", type=int)
  parser.add_argument("--labels_known", type=int)
  parser.add_argument("--seed", type=int)
  parser.add_argument("--threads", type=int)
  parser.add_argument("--gpu", action="store_true")
  args = parser.parse_args()
  PEERS[args.peer](args, args.folder)


if __name__ == "__main__":
  main()
