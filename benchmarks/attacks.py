"""How fast and how well an undefended update is inverted, beside peers.

    python -m benchmarks.attacks --attack=dlg --model=lenet_zhu \
      --dataset=cifar10_sample --images=8 --peers=breaching

Every system attacks the same test images at the same weights: the draw of the
weights alone moves a median by several dB. Each runs in a process of its own,
one after the other and, with --repeats, over again in turns; the fastest run of
a system is the one that its row shows. Peers use the settings of their own
configuration of the attack; ours are the attack's defaults. Starting points are
drawn by each system itself. A peer is run by the interpreter
`<peers_dir>/<peer>/bin/python`.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

PEERS = ("breaching",)
PEER_MODELS = ("lenet_zhu",)
Row = dict[str, Any]


def _ours(args: argparse.Namespace, folder: pathlib.Path) -> None:
  import jax

  from mpqfl_jax import attacks

  model, params, x = _task(args)
  truth = np.load(folder / "task.npz")
  observation = _observe(model, params, truth["x"], truth["y"])
  attack = attacks.make(args.attack, model, auxiliary=x)
  found = attacks.run(
    attack, observation, jax.random.key(args.seed), progress=False
  )
  _answer(folder, found.x[:, 0], found.iterations.mean(), found.seconds)
  (folder / "compile.json").write_text(json.dumps(found.compile_seconds))


def _task(args: argparse.Namespace):
  """The model, its weights, and the training images."""
  import jax

  from mpqfl_jax import datasets, models

  data = datasets.load(args.dataset)
  model = models.make(
    args.model,
    data.x_train.shape[1:],
    len(data.class_names),
    data.mean,
    data.std,
    conv="slices" if jax.default_backend() == "cpu" else "xla",
  )
  params = model.init(jax.random.key(args.seed))
  return model, params, np.asarray(data.x_train)


def _observe(model, params, x, y):
  import jax
  import jax.numpy as jnp

  from mpqfl_jax import attacks
  from mpqfl_jax.types import Observation

  n = len(x)
  one = jax.jit(lambda x, y: attacks.simulate(model, params, x, y, 1.0))
  updates = [
    one(image[None, None], jnp.asarray(label)[None, None])
    for image, label in zip(x, y, strict=True)
  ]
  return Observation(
    jax.tree.map(lambda a: np.broadcast_to(a, (n, *a.shape)), params),
    jax.tree.map(lambda *a: np.stack(a), *updates),
    None,
    None,
    jnp.ones(n),
  )


def _answer(folder, x, iterations, seconds) -> None:
  np.savez(folder / "answer.npz", x=x, iterations=iterations, seconds=seconds)


def _breaching(args: argparse.Namespace, folder: pathlib.Path) -> None:
  """Geiping's breaching; imports nothing of this package."""
  import omegaconf
  import torch

  # breaching imports torchvision, whose build in the registry is for another
  # torch than the CPU's and then fails for want of its own operators. Nothing
  # here calls them.
  library = torch.library.Library("torchvision", "DEF")
  for name in ("nms", "qnms"):
    library.define(
      f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    )
  import breaching

  arrays = np.load(folder / "task.npz")
  height, width, channels = arrays["x"].shape[1:]
  classes = arrays["w3"].shape[1]
  layers, last, side = [], channels, (height, width)
  for i, stride in enumerate((2, 2, 1)):
    conv = torch.nn.Conv2d(last, 12, 5, padding=2, stride=stride)
    conv.weight.data = torch.tensor(arrays[f"w{i}"].transpose(3, 2, 0, 1))
    conv.bias.data = torch.tensor(arrays[f"b{i}"])
    layers += [conv, torch.nn.Sigmoid()]
    last, side = 12, tuple(-(-s // stride) for s in side)
  dense = torch.nn.Linear(12 * side[0] * side[1], classes)
  # Flattened (row, column, channel) here, (channel, row, column) there.
  kernel = arrays["w3"].reshape(*side, 12, classes).transpose(3, 2, 0, 1)
  dense.weight.data = torch.tensor(kernel.reshape(classes, -1).copy())
  dense.bias.data = torch.tensor(arrays["b3"])
  model = torch.nn.Sequential(*layers, torch.nn.Flatten(), dense)

  theirs = {"dlg": "deepleakage", "inverting_gradients": "invertinggradients"}
  cfg = breaching.get_attack_config(theirs[args.attack])
  setup = {"device": torch.device("cpu"), "dtype": torch.float}
  torch.manual_seed(args.seed)
  loss_fn = torch.nn.CrossEntropyLoss()

  center = [float(v) for v in arrays["mean"]]
  spread = [float(v) for v in arrays["std"]]
  metadata = omegaconf.OmegaConf.create(
    {
      "modality": "vision",
      "task": "classification",
      "classes": classes,
      "shape": [channels, height, width],
      "normalize": True,
      "mean": center,
      "std": spread,
    }
  )
  mean = torch.tensor(center)[None, :, None, None]
  std = torch.tensor(spread)[None, :, None, None]
  found, begin = [], time.perf_counter()
  for image, label in zip(arrays["x"], arrays["y"], strict=True):
    x = (torch.tensor(image.transpose(2, 0, 1))[None] - mean) / std
    loss = loss_fn(model(x), torch.tensor([int(label)]))
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    attacker = breaching.attacks.prepare_attack(model, loss_fn, cfg, setup)
    payload = {
      "parameters": [p.detach() for p in model.parameters()],
      "buffers": [],
      "metadata": metadata,
    }
    shared = {
      "gradients": [g.detach() for g in gradients],
      "buffers": None,
      "metadata": {
        "num_data_points": 1,
        "labels": None,
        "local_hyperparams": None,
      },
    }
    answer, _ = attacker.reconstruct([payload], [shared], {}, dryrun=False)
    z = answer["data"].detach() * std + mean
    found.append(z[0].permute(1, 2, 0).clip(0, 1).numpy())
  seconds = time.perf_counter() - begin
  _answer(folder, np.stack(found), int(cfg.optim.max_iterations), seconds)


def _prepare(args: argparse.Namespace, folder: pathlib.Path) -> None:
  """Writes the task that all systems solve: images, labels, weights."""
  from mpqfl_jax import datasets

  model, params, _ = _task(args)
  data = datasets.load(args.dataset)
  arrays = {
    "x": data.x_test[: args.images].astype(np.float32) / 255.0,
    "y": data.y_test[: args.images],
    "mean": model.mean,
    "std": model.std,
  }
  if args.model in PEER_MODELS:
    for i, name in enumerate(("conv1", "conv2", "conv3", "dense1")):
      arrays[f"w{i}"] = np.asarray(params[name]["kernel"])
      arrays[f"b{i}"] = np.asarray(params[name]["bias"])
  np.savez(folder / "task.npz", **arrays)


def _worker(args: argparse.Namespace) -> None:
  folder = pathlib.Path(args.folder)
  if args.worker == "breaching":
    _breaching(args, folder)
    return
  import jax

  if args.devices:
    jax.config.update("jax_num_cpu_devices", args.devices)
  {"prepare": _prepare, "ours": _ours}[args.worker](args, folder)


def _run(args: argparse.Namespace, system: str, folder: pathlib.Path) -> None:
  python = sys.executable
  if system in PEERS:
    python = str(pathlib.Path(args.peers_dir) / system / "bin" / "python")
  command = [
    python,
    *([__file__] if system in PEERS else ["-m", "benchmarks.attacks"]),
    f"--worker={system}",
    f"--folder={folder}",
    *(
      f"--{name}={getattr(args, name)}"
      for name in (
        "attack",
        "model",
        "dataset",
        "images",
        "seed",
        "devices",
      )
    ),
  ]
  subprocess.run(command, check=True)


def _row(args: argparse.Namespace, system: str, folder: pathlib.Path) -> Row:
  truth = np.load(folder / "task.npz")["x"]
  answer = np.load(folder / "answer.npz")
  mse = np.mean((answer["x"] - truth) ** 2, axis=(1, 2, 3))
  psnr = -10 * np.log10(np.maximum(mse, 1e-12))
  each = float(answer["seconds"]) / len(truth)
  compile_file = folder / "compile.json"
  ours = system == "ours"
  return {
    "system": system,
    "version": _version(args, system),
    "attack": args.attack,
    "model": args.model,
    "images": len(truth),
    "batch_size": 1,
    "iterations": float(answer["iterations"]),
    "ms_per_iteration_per_image": 1e3 * each / float(answer["iterations"]),
    "seconds_per_image": each,
    "psnr_db_median": float(np.median(psnr)),
    "psnr_db_min": float(psnr.min()),
    "success_rate": float(np.mean(psnr >= 20)),
    "compile_seconds": json.loads(compile_file.read_text()) if ours else 0.0,
  }


def _version(args: argparse.Namespace, system: str) -> str:
  package = "mpqfl_jax" if system == "ours" else system
  python = sys.executable
  if system in PEERS:
    python = str(pathlib.Path(args.peers_dir) / system / "bin" / "python")
  code = f"from importlib import metadata; print(metadata.version('{package}'))"
  done = subprocess.run(
    [python, "-c", code], check=True, capture_output=True, text=True
  )
  return done.stdout.strip()


def _parse() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--attack", default="dlg")
  parser.add_argument("--model", default="lenet_zhu")
  parser.add_argument("--dataset", default="cifar10_sample")
  parser.add_argument("--images", type=int, default=8)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--devices", type=int, default=2, help="CPU devices.")
  parser.add_argument("--repeats", type=int, default=1)
  parser.add_argument("--peers", default="", help=f"Of: {', '.join(PEERS)}.")
  parser.add_argument("--peers_dir", default=".venv-peers")
  parser.add_argument("--json", help="Also write the rows to this file.")
  parser.add_argument("--worker", help=argparse.SUPPRESS)
  parser.add_argument("--folder", help=argparse.SUPPRESS)
  return parser.parse_args()


def main() -> None:
  args = _parse()
  if args.worker:
    _worker(args)
    return
  peers = [peer for peer in args.peers.split(",") if peer]
  for peer in peers:
    if peer not in PEERS:
      sys.exit(f"--peers={args.peers}: unknown {peer!r}; expected {PEERS}.")
  if peers and args.model not in PEER_MODELS:
    sys.exit(f"--model={args.model}: peers are compared on {PEER_MODELS}.")
  best: dict[str, Row] = {}
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    _run(args, "prepare", folder)
    for _ in range(args.repeats):
      for system in ("ours", *peers):
        _run(args, system, folder)
        row = _row(args, system, folder)
        old = best.get(system)
        if old is None or row["seconds_per_image"] < old["seconds_per_image"]:
          best[system] = row
  columns = (
    "system",
    "iterations",
    "ms_per_iteration_per_image",
    "seconds_per_image",
    "psnr_db_median",
    "psnr_db_min",
    "success_rate",
    "compile_seconds",
  )
  print("  ".join(columns))
  for row in best.values():
    cells = (
      f"{row[c]:.4g}" if isinstance(row[c], float) else str(row[c])
      for c in columns
    )
    print(
      "  ".join(
        cell.ljust(len(c)) for cell, c in zip(cells, columns, strict=True)
      )
    )
  if args.json:
    pathlib.Path(args.json).write_text(
      json.dumps(list(best.values()), indent=2)
    )


if __name__ == "__main__":
  main()
