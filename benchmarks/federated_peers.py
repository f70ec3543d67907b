"""The work of `benchmarks.federated` in other systems.

Each worker imports its own system and nothing of this package, so that it runs
in the peer's environment. A worker is given `task.npz` (images, labels, initial
weights), runs one round that is checked and then the rounds that are timed, and
writes `answer.npz` (the weights after the first round) and `answer.json`. The
batches of every client are its examples in their order, as often as its system
allows that; nobody shuffles in the timed rounds more than its defaults ask for.
"""

import argparse
import copy
from importlib import metadata
import itertools
import json
import os
import pathlib
import time
from typing import Any

import numpy as np

LEARNING_RATE, BATCH, EXAMPLES = 0.05, 16, 64
# Layers by name, in order: their kernels' and biases' places in `task.npz`.
LAYERS = {
  "lenet_zhu": ("conv1", "conv2", "conv3", "dense1"),
  "cnn": ("conv1", "conv2", "dense1", "dense2"),
}
# Height and width of the last feature map, and its channels.
FEATURES = {"lenet_zhu": (7, 7, 12), "cnn": (7, 7, 64)}
Arrays = dict[str, np.ndarray]


def images(task: Any) -> np.ndarray:
  """[clients, examples, height, width, channels] float32 in [0, 1]."""
  return task["x"].astype(np.float32) / 255.0


def finish(
  folder: pathlib.Path,
  weights: Arrays,
  seconds: list[float],
  plan: str,
  *packages: str,
) -> None:
  """Writes what the parent reads: first-round weights, times of all rounds."""
  np.savez(folder / "answer.npz", **weights)  # type: ignore[arg-type]
  versions = [f"{name} {metadata.version(name)}" for name in packages]
  answer = {"seconds": seconds, "plan": plan, "version": ", ".join(versions)}
  (folder / "answer.json").write_text(json.dumps(answer))


def torch_model(model: str) -> Any:
  """The classifier as its users write it in torch."""
  from torch import nn

  if model == "cnn":
    return nn.Sequential(
      nn.Conv2d(1, 32, 5, padding=2),
      nn.ReLU(),
      nn.MaxPool2d(2),
      nn.Conv2d(32, 64, 5, padding=2),
      nn.ReLU(),
      nn.MaxPool2d(2),
      nn.Flatten(),
      nn.Linear(3136, 512),
      nn.ReLU(),
      nn.Linear(512, 10),
    )
  return nn.Sequential(
    nn.Conv2d(1, 12, 5, 2, 2),
    nn.Sigmoid(),
    nn.Conv2d(12, 12, 5, 2, 2),
    nn.Sigmoid(),
    nn.Conv2d(12, 12, 5, 1, 2),
    nn.Sigmoid(),
    nn.Flatten(),
    nn.Linear(588, 10),
  )


def _to_torch(model: str, name: str, array: np.ndarray) -> np.ndarray:
  """A kernel in torch's order of axes."""
  if array.ndim == 4:
    return array.transpose(3, 2, 0, 1)
  if array.ndim == 2 and name.startswith("dense1"):
    # The features are flattened (row, column, channel) there and (channel, row,
    # column) in torch.
    height, width, channels = FEATURES[model]
    array = array.reshape(height, width, channels, -1).transpose(2, 0, 1, 3)
    array = array.reshape(height * width * channels, -1)
  return array.T


def load_torch(model: str, task: Any) -> dict[str, Any]:
  """The initial weights as a state dict of `torch_model`."""
  import torch

  state, names = {}, list(torch_model(model).state_dict())
  keys = [f"{layer}/{leaf}" for layer in LAYERS[model] for leaf in _LEAVES]
  for name, key in zip(names, keys, strict=True):
    array = _to_torch(model, key, task[key])
    state[name] = torch.from_numpy(np.ascontiguousarray(array))
  return state


_LEAVES = ("kernel", "bias")


def dump_torch(model: str, state: dict[str, Any]) -> Arrays:
  """The inverse of `load_torch`."""
  keys = [f"{layer}/{leaf}" for layer in LAYERS[model] for leaf in _LEAVES]
  found = {}
  for key, value in zip(keys, state.values(), strict=True):
    array = value.detach().cpu().numpy()
    if array.ndim == 4:
      array = array.transpose(2, 3, 1, 0)
    elif array.ndim == 2:
      array = array.T
      if key.startswith("dense1"):
        height, width, channels = FEATURES[model]
        array = array.reshape(channels, height, width, -1).transpose(1, 2, 0, 3)
        array = array.reshape(height * width * channels, -1)
    found[key] = array.copy()
  return found


def torch_data(task: Any) -> tuple[Any, Any]:
  """Images [clients, examples, channels, height, width] and labels."""
  import torch

  x = np.ascontiguousarray(images(task).transpose(0, 1, 4, 2, 3))
  return torch.from_numpy(x), torch.from_numpy(task["y"].astype(np.int64))


def run_torch(args: argparse.Namespace, folder: pathlib.Path) -> None:
  """A loop over clients, as a researcher without a framework writes it."""
  import torch
  from torch.nn import functional

  device = "cuda" if torch.cuda.is_available() else "cpu"
  # Convolutions on a GPU are in TF32 otherwise, which the check finds out.
  torch.backends.cudnn.allow_tf32 = False
  task = np.load(folder / "task.npz")
  x, y = (part.to(device) for part in torch_data(task))
  net = torch_model(args.model)
  net.load_state_dict(load_torch(args.model, task))
  net.to(device)
  seconds, weights = [], None
  for _ in range(args.rounds + 1):
    began = time.perf_counter()
    total = [torch.zeros_like(p) for p in net.parameters()]
    for client in range(len(x)):
      local = copy.deepcopy(net)
      sgd = torch.optim.SGD(local.parameters(), lr=LEARNING_RATE)
      for i in range(0, EXAMPLES, BATCH):
        rows = slice(i, i + BATCH)
        sgd.zero_grad()
        loss = functional.cross_entropy(local(x[client, rows]), y[client, rows])
        loss.backward()
        sgd.step()
      with torch.no_grad():
        for part, p in zip(total, local.parameters(), strict=True):
          part.add_(p, alpha=EXAMPLES)
    with torch.no_grad():
      for p, part in zip(net.parameters(), total, strict=True):
        p.copy_(part / (EXAMPLES * len(x)))
    if device == "cuda":
      torch.cuda.synchronize()
    seconds.append(time.perf_counter() - began)
    weights = weights or dump_torch(args.model, net.state_dict())
  plan = f"loop, {torch.get_num_threads()} threads"
  if device == "cuda":
    plan = "loop, cuda"
  finish(folder, weights or {}, seconds, plan, "torch")


def run_pfl(args: argparse.Namespace, folder: pathlib.Path) -> None:
  """pfl-research, one process a core under torchrun."""
  from pfl.aggregate.simulate import SimulatedBackend
  from pfl.aggregate.weighting import WeightByDatapoints
  from pfl.algorithm.base import NNAlgorithmParams
  from pfl.algorithm.federated_averaging import FederatedAveraging
  from pfl.callback.base import TrainingProcessCallback
  from pfl.data.dataset import Dataset
  from pfl.data.federated_dataset import FederatedDataset
  from pfl.data.sampling import get_user_sampler
  from pfl.hyperparam import NNTrainHyperParams
  from pfl.metrics import Weighted
  from pfl.model.pytorch import PyTorchModel
  import torch
  from torch import nn
  from torch.nn import functional

  class Net(nn.Module):
    def __init__(self):
      super().__init__()
      self.net = torch_model(args.model)

    def forward(self, x):
      return self.net(x)

    def loss(self, x, y, eval=False):
      return functional.cross_entropy(self(x), y)

    def metrics(self, x, y, eval=False):
      loss = functional.cross_entropy(self(x), y, reduction="sum")
      return {"loss": Weighted(loss.item(), len(y))}

  task = np.load(folder / "task.npz")
  x, y = torch_data(task)
  np.random.seed(0)
  net = Net()
  net.net.load_state_dict(load_torch(args.model, task))
  seconds: list[float] = []
  weights: Arrays = {}

  class Clock(TrainingProcessCallback):
    def on_train_begin(self, *, model):
      self.last = time.perf_counter()
      return super().on_train_begin(model=model)

    def after_central_iteration(
      self, aggregate_metrics, model, *, central_iteration
    ):
      now = time.perf_counter()
      seconds.append(now - self.last)
      if not weights:
        weights.update(dump_torch(args.model, net.net.state_dict()))
      self.last = time.perf_counter()
      return super().after_central_iteration(
        aggregate_metrics, model, central_iteration=central_iteration
      )

  FederatedAveraging().run(
    algorithm_params=NNAlgorithmParams(
      central_num_iterations=args.rounds + 1,
      evaluation_frequency=10**9,
      train_cohort_size=len(x),
      val_cohort_size=None,
    ),
    backend=SimulatedBackend(
      training_data=FederatedDataset(
        lambda user: Dataset(raw_data=[x[user], y[user]]),
        get_user_sampler("minimize_reuse", list(range(len(x)))),
      ),
      val_data=None,
      postprocessors=[WeightByDatapoints()],
    ),
    model=PyTorchModel(
      net,
      local_optimizer_create=torch.optim.SGD,
      central_optimizer=torch.optim.SGD(net.parameters(), 1.0),
    ),
    model_train_params=NNTrainHyperParams(
      local_learning_rate=LEARNING_RATE,
      local_num_epochs=1,
      local_batch_size=BATCH,
    ),
    model_eval_params=None,
    callbacks=[Clock()],
  )
  if int(os.environ.get("RANK", "0")) == 0:
    count = os.environ.get("WORLD_SIZE", "1")
    plan = f"torchrun, {count} processes, {torch.get_num_threads()} thread"
    finish(folder, weights, seconds, plan, "pfl", "torch")


def run_fedjax(args: argparse.Namespace, folder: pathlib.Path) -> None:
  """FedJAX's own FedAvg; its examples are not shuffled, which costs less."""
  import fedjax
  from fedjax.algorithms import fed_avg
  import haiku as hk
  import jax
  import jax.numpy as jnp

  def forward(batch):
    x, pad = batch["x"], [(2, 2), (2, 2)]
    if args.model == "cnn":
      for i, width in enumerate((32, 64)):
        conv = hk.Conv2D(width, 5, padding=pad, name=f"conv{i + 1}")
        x = jax.nn.relu(conv(x))
        x = hk.MaxPool((1, 2, 2, 1), (1, 2, 2, 1), "VALID")(x)
      x = jax.nn.relu(hk.Linear(512, name="dense1")(hk.Flatten()(x)))
      return hk.Linear(10, name="dense2")(x)
    for i, stride in enumerate((2, 2, 1)):
      conv = hk.Conv2D(12, 5, stride=stride, padding=pad, name=f"conv{i + 1}")
      x = jax.nn.sigmoid(conv(x))
    return hk.Linear(10, name="dense1")(hk.Flatten()(x))

  task = np.load(folder / "task.npz")
  x, y = images(task), task["y"]
  model = fedjax.create_model_from_haiku(
    hk.transform(forward),
    {"x": x[0, :1], "y": y[0, :1]},
    lambda batch, logits: fedjax.metrics.unreduced_cross_entropy_loss(
      batch["y"], logits
    ),
    {"loss": fedjax.metrics.CrossEntropyLoss()},
  )

  def loss(params, batch, key):
    return jnp.mean(
      model.train_loss(batch, model.apply_for_train(params, batch, key))
    )

  clients = fedjax.InMemoryFederatedData(
    {
      b"%06d" % i: {"x": x[i], "y": y[i].astype(np.int32)}
      for i in range(len(x))
    }
  )
  algorithm = fed_avg.federated_averaging(
    jax.jit(jax.grad(loss)),
    fedjax.optimizers.sgd(LEARNING_RATE),
    fedjax.optimizers.sgd(1.0),
    fedjax.ShuffleRepeatBatchHParams(
      batch_size=BATCH, num_epochs=1, skip_shuffle=True
    ),
  )
  leaves = {"kernel": "w", "bias": "b"}
  state = algorithm.init(
    {
      layer: {
        name: jnp.asarray(task[f"{layer}/{leaf}"])
        for leaf, name in leaves.items()
      }
      for layer in LAYERS[args.model]
    }
  )
  sampler = fedjax.client_samplers.UniformGetClientSampler(
    clients, len(x), seed=0
  )
  seconds: list[float] = []
  weights: Arrays = {}
  for _ in range(args.rounds + 1):
    began = time.perf_counter()
    state, _ = algorithm.apply(state, sampler.sample())
    jax.block_until_ready(state.params)
    seconds.append(time.perf_counter() - began)
    if not weights:
      weights = {
        f"{layer}/{leaf}": np.array(state.params[layer][name])
        for layer in LAYERS[args.model]
        for leaf, name in leaves.items()
      }
  finish(folder, weights, seconds, "jit", "fedjax", "jax")


# A Flower actor keeps the data that it has read for all of its clients.
_flower_data: dict[str, tuple[Any, Any]] = {}


def run_flower(args: argparse.Namespace, folder: pathlib.Path) -> None:
  """Flower's simulation: ray, one actor of one thread a core."""
  os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
  os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
  from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Message,
    MetricRecord,
    RecordDict,
  )
  from flwr.clientapp import ClientApp
  from flwr.serverapp import ServerApp
  from flwr.serverapp.strategy import FedAvg
  from flwr.simulation import run_simulation
  import torch
  from torch.nn import functional

  model, path, cores = args.model, str(folder / "task.npz"), os.cpu_count() or 1
  marks: list[float] = []
  weights: Arrays = {}
  client_app, server_app = ClientApp(), ServerApp()

  @client_app.train()
  def train(message, context):
    torch.set_num_threads(1)
    if path not in _flower_data:
      _flower_data[path] = torch_data(np.load(path))
    client = context.node_config["partition-id"]
    x, y = (part[client] for part in _flower_data[path])
    net = torch_model(model)
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    sgd = torch.optim.SGD(net.parameters(), lr=message.content["config"]["lr"])
    for i in range(0, EXAMPLES, BATCH):
      sgd.zero_grad()
      loss = functional.cross_entropy(net(x[i : i + BATCH]), y[i : i + BATCH])
      loss.backward()
      sgd.step()
    metrics = MetricRecord({"num-examples": EXAMPLES, "loss": loss.item()})
    arrays = ArrayRecord(net.state_dict())
    content = RecordDict({"arrays": arrays, "metrics": metrics})
    return Message(content=content, reply_to=message)

  class Timed(FedAvg):
    def configure_train(self, *a, **k):
      marks.append(time.perf_counter())
      return super().configure_train(*a, **k)

    def aggregate_train(self, *a, **k):
      arrays, metrics = super().aggregate_train(*a, **k)
      if not weights and arrays is not None:
        weights.update(dump_torch(model, arrays.to_torch_state_dict()))
      return arrays, metrics

  @server_app.main()
  def serve(grid, context):
    task = np.load(path)
    count = len(task["y"])
    Timed(
      fraction_train=1.0,
      fraction_evaluate=0.0,
      min_train_nodes=count,
      min_evaluate_nodes=0,
      min_available_nodes=count,
    ).start(
      grid=grid,
      initial_arrays=ArrayRecord(load_torch(model, task)),
      train_config=ConfigRecord({"lr": LEARNING_RATE}),
      num_rounds=args.rounds + 1,
    )
    marks.append(time.perf_counter())

  run_simulation(
    server_app=server_app,
    client_app=client_app,
    num_supernodes=len(np.load(path)["y"]),
    backend_config={
      "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
      "init_args": {"num_cpus": cores},
    },
  )
  seconds = [end - start for start, end in itertools.pairwise(marks)]
  plan = f"ray, {cores} actors"
  finish(folder, weights, seconds, plan, "flwr", "ray", "torch")


PEERS = {
  "fedjax": run_fedjax,
  "pfl": run_pfl,
  "flower": run_flower,
  "torch": run_torch,
}


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("peer", choices=PEERS)
  parser.add_argument("folder", type=pathlib.Path)
  parser.add_argument("--model", choices=LAYERS)
  parser.add_argument("--rounds", type=int)
  args = parser.parse_args()
  PEERS[args.peer](args, args.folder)


if __name__ == "__main__":
  main()
