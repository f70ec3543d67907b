"""How fast and how well an undefended update is inverted, beside peers.

    python -m benchmarks.attacks --attack=dlg --model=lenet_zhu \
      --dataset=cifar10_sample --images=8 --peers=breaching
    python -m benchmarks.attacks --suite --json=FILE --page=docs/attacks.md

Every system attacks the same test images at the same weights: the draw of the
weights alone moves a median by several dB. A peer refuses to start where its
logits or its gradient are not ours. Each system runs in a process of its own,
one after the other and, with --repeats, over again in turns; the fastest run of
a system is the one that its row shows. Starting points are drawn by each system
itself. A peer is run by the interpreter `<peers_dir>/<peer>/bin/python`
(`make bench-peers`), by its own configuration of the attack; ours are the
attack's defaults, started as `experiments.main` starts itself, on as many
devices as there are images, at most --devices; torch gets one thread or
--devices, whichever is faster in a few steps before. --gpu runs all systems on
the machine's first GPU instead, in float32 there as well; ours searches for up
to 32 images side by side there.

`iterations` are steps that follow one gradient: of Adam, or of L-BFGS, of which
an iteration in the peer's configuration of DLG has up to 20. --iterations gives
all systems as many; 0 leaves each its own default.

--suite runs several comparisons, each written to --json as soon as it is done,
in the place of an older one of that attack, model and search; --page puts the
table of the file's rows between the marks of a page, without --suite from what
is there.
"""

import argparse
from collections.abc import Iterable
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

import numpy as np

from benchmarks import attacks_peers, attacks_table, attacks_task, page
from benchmarks.attacks_table import Row
from mpqfl_jax import errors, host, metrics, specs

PEERS = tuple(attacks_peers.SUPPORTED)
# What the published table compares, in half an hour on two cores.
SUITE = (
  "dlg(model=lenet_zhu,images=8),"
  "inverting_gradients(model=lenet_zhu,images=8,iterations=4800),"
  "inverting_gradients(model=convnet,images=4,iterations=600),"
  "inverting_gradients(model=resnet20,images=2,iterations=300),"
  "inverting_gradients(model=resnet18,images=1,iterations=60),"
  "rgap(model=cnn6,images=2)"
)


class Comparison(NamedTuple):
  """One attack on one model, by all systems.

  Attributes:
    attack: one of `attacks.ATTACKS`.
    model: one of `models.MODELS`.
    images: how many test images, each alone in an update.
    iterations: steps of every system, 0 for each system's default.
    labels_known: whether the systems are given the true labels.
    search: of our attack, where it has several; empty for its default.
  """

  attack: str
  model: str
  images: int
  iterations: int = 0
  labels_known: bool = False
  search: str = ""


def suite(text: str, images: int) -> list[Comparison]:
  """The comparisons that a flag names.

  Labels are known where both systems would read them off the same entries of
  the last layer otherwise, that is to Inverting Gradients.

  Args:
    text: such as `dlg(model=lenet_zhu,images=8),rgap(model=cnn6)`.
    images: where a comparison says nothing of their number.

  Raises:
    UserError: not of this form, or settings that there are not.
  """
  found = []
  for attack, params in map(specs.parse, specs.split(text)):
    for name in params:
      if name not in Comparison._fields[1:]:
        raise errors.unknown_name(
          f"setting of {attack!r} in --suite:", name, Comparison._fields[1:]
        )
    if "model" not in params:
      raise errors.UserError(
        f"--suite: {attack!r} names no model; expected such as"
        f" {attack}(model=lenet_zhu,images=2)."
      )
    known = attack == "inverting_gradients"
    defaults = {"images": images, "labels_known": known}
    found.append(Comparison(attack, **(defaults | params)))
  return found


def check(
  comparison: Comparison, peers: Iterable[str], gpu: bool = False
) -> None:
  """Refuses what a system cannot run, before anything is run.

  Args:
    comparison: what is to be run.
    peers: beside which systems.
    gpu: whether on a GPU.

  Raises:
    UserError: unknown names, or a comparison that is not fair or not there.
  """
  from mpqfl_jax import attacks, models
  from mpqfl_jax.attacks import core, inverting_gradients

  attack, model = comparison.attack, comparison.model
  if attack not in attacks.ATTACKS:
    raise errors.unknown_name("attack", attack, attacks.ATTACKS)
  if model not in models.MODELS:
    raise errors.unknown_name("model", model, models.MODELS)
  if comparison.images < 1 or comparison.iterations < 0:
    raise errors.UserError(
      f"{attack} with images={comparison.images} and"
      f" iterations={comparison.iterations}: expected at least 1 image, and 0"
      " iterations for each system's default or more."
    )
  if attack == "rgap" and gpu:
    raise errors.UserError("--gpu: rgap solves on the host; expected a search.")
  if comparison.search and attack != "inverting_gradients":
    raise errors.UserError(
      f"{attack} with search={comparison.search}: expected it of"
      " inverting_gradients alone."
    )
  if comparison.search:
    core.choose("search", comparison.search, inverting_gradients.SEARCHES)
  if attack == "rgap" and comparison.iterations:
    raise errors.UserError(
      f"--iterations={comparison.iterations}: rgap is a closed form; expected 0"
    )
  for peer in peers:
    if peer not in attacks_peers.SUPPORTED:
      raise errors.unknown_name("peer", peer, attacks_peers.SUPPORTED)
    supported = attacks_peers.SUPPORTED[peer]
    if attack not in supported:
      raise errors.UserError(
        f"attack {attack!r} is not compared with {peer}; expected one of:"
        f" {', '.join(supported)}."
      )
    if model not in supported[attack]:
      raise errors.UserError(
        f"{attack} on model {model!r} is not compared with {peer}; expected one"
        f" of: {', '.join(supported[attack])}."
      )
    if attack == "dlg" and comparison.labels_known:
      raise errors.UserError(
        f"--labels_known: {peer}'s dlg always searches for the labels."
      )


def _ours(args: argparse.Namespace, folder: pathlib.Path) -> None:
  import jax

  from experiments import folder as folder_lib
  from mpqfl_jax import attacks

  model, params, data = attacks_task.make(args.model, args.dataset, args.seed)
  truth = np.load(folder / "task.npz")
  observation = attacks_task.observed(
    model, params, truth["x"], truth["y"], args.labels_known
  )
  settings: dict[str, Any] = {}
  if args.iterations:
    settings["iterations"] = args.iterations
  if args.search:
    settings["search"] = args.search
  attack = attacks.make(
    args.attack, model, auxiliary=np.asarray(data.x_train), **settings
  )
  found = attacks.run(
    attack,
    observation,
    jax.random.key(args.seed),
    devices=jax.devices()[:1] if args.gpu else None,
    progress=False,
  )
  attacks_peers.finish(
    folder,
    found.x[:, 0],
    iterations=found.iterations.mean(),
    seconds=found.seconds,
    packages=("mpqfl_jax", "jax"),
    compile_seconds=found.compile_seconds,
    device=jax.devices()[0].device_kind if args.gpu else None,
    commit=folder_lib.environment()["commit"],
  )


def _prepare(args: argparse.Namespace, folder: pathlib.Path) -> None:
  """Writes the task that all systems solve, and what they have to agree on."""
  import jax

  from mpqfl_jax import trees

  model, params, data = attacks_task.make(args.model, args.dataset, args.seed)
  rows = slice(args.first, args.first + args.images)
  x = np.asarray(data.x_test[rows]).astype(np.float32) / 255.0
  y = np.asarray(data.y_test[rows])
  if len(x) < args.images:
    sys.exit(
      f"--first={args.first}, {args.images} images: {args.dataset} has"
      f" {len(data.x_test)} test images"
    )
  arrays = {
    "x": x,
    "y": y,
    "mean": model.mean,
    "std": model.std,
    "logits": np.asarray(jax.jit(model.apply)(params, x)),
  }
  sent = jax.tree.leaves(attacks_task.updates(model, params, x, y))
  leaves = zip(
    trees.leaf_names(params), jax.tree.leaves(params), sent, strict=True
  )
  for name, weights, update in leaves:
    arrays[f"params/{name}"] = np.asarray(weights)
    arrays[f"norm/{name}"] = np.linalg.norm(update.reshape(len(x), -1), axis=1)
  np.savez(folder / "task.npz", **arrays)


def _worker(args: argparse.Namespace) -> None:
  import jax

  if args.devices:
    jax.config.update("jax_num_cpu_devices", min(args.devices, args.images))
  from mpqfl_jax import exact

  if args.gpu and jax.default_backend() == "cpu":
    sys.exit("--gpu: JAX has no GPU here; expected one, and its plugin for it")
  work = {"prepare": _prepare, "ours": _ours}[args.worker]
  with exact.products():
    work(args, pathlib.Path(args.folder))


def _command(
  args: argparse.Namespace,
  comparison: Comparison,
  system: str,
  folder: pathlib.Path,
) -> tuple[list[str], dict[str, str]]:
  """How a system is started, and its environment."""
  env = dict(os.environ)
  flags = {
    "attack": comparison.attack,
    "model": comparison.model,
    "iterations": comparison.iterations,
    "seed": args.seed,
  }
  if system in PEERS:
    python = pathlib.Path(args.peers_dir) / system / "bin" / "python"
    if not python.exists():
      sys.exit(f'no {python}: run `make bench-peers PEERS="{system}"` first')
    start = [str(python), attacks_peers.__file__, system, str(folder)]
    threads = args.devices or os.cpu_count()
    flags |= {"labels_known": int(comparison.labels_known), "threads": threads}
    switches = []
    # A thread that spins while another program has the core of the one it waits
    # for makes a search fifty times slower.
    env.setdefault("OMP_WAIT_POLICY", "PASSIVE")
  else:
    start = [sys.executable, "-m", "benchmarks.attacks", f"--worker={system}"]
    flags |= {
      "folder": folder,
      "dataset": args.dataset,
      "images": comparison.images,
      "first": args.first,
      "devices": args.devices,
      "search": comparison.search,
    }
    switches = ["--labels_known"] if comparison.labels_known else []
    env |= host.variables()
  switches += ["--gpu"] * args.gpu
  words = [f"--{name}={value}" for name, value in flags.items()]
  return [*start, *words, *switches], env


def _run(
  args: argparse.Namespace,
  comparison: Comparison,
  system: str,
  folder: pathlib.Path,
) -> None:
  command, env = _command(args, comparison, system, folder)
  done = subprocess.run(
    command,
    env=env,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  if done.returncode:
    sys.exit(f"{system} failed:\n{done.stdout[-4000:]}")


def row(
  args: argparse.Namespace,
  comparison: Comparison,
  system: str,
  folder: pathlib.Path,
) -> Row:
  """What a system reached, from the files that its process left behind."""
  truth = np.load(folder / "task.npz")["x"]
  found = np.load(folder / "answer.npz")["x"]
  answer = json.loads((folder / "answer.json").read_text())
  psnr = metrics.psnr_db(truth, found)
  each = answer.pop("seconds") / len(truth)
  iterations = answer.pop("iterations")
  return {
    "system": system,
    "version": answer.pop("version"),
    "attack": comparison.attack,
    "model": comparison.model,
    "dataset": args.dataset,
    "first": args.first,
    "images": len(truth),
    "batch_size": 1,
    "labels_known": comparison.labels_known,
    "search": comparison.search,
    "seed": args.seed,
    "iterations": iterations,
    "ms_per_iteration_per_image": 1e3 * each / iterations,
    "seconds_per_image": each,
    "psnr_db_median": float(np.median(psnr)),
    "psnr_db_min": float(psnr.min()),
    "success_rate": metrics.success_rate(psnr).rate,
    "repeats": args.repeats,
    "devices": 1 if args.gpu else args.devices,
    "cpu": host.processor(),
    "cores": os.cpu_count(),
    **answer,
  }


def compare(
  args: argparse.Namespace, comparison: Comparison, peers: Iterable[str]
) -> list[Row]:
  """A row a system, each the fastest of its turns."""
  best: dict[str, Row] = {}
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    _run(args, comparison, "prepare", folder)
    for _ in range(args.repeats):
      for system in ("ours", *peers):
        _run(args, comparison, system, folder)
        new = row(args, comparison, system, folder)
        old = best.get(system)
        if old is None or new["seconds_per_image"] < old["seconds_per_image"]:
          best[system] = new
  return list(best.values())


def merge(old: list[Row], new: list[Row]) -> list[Row]:
  """The old rows, with those of a comparison that was run anew."""
  if not new:
    return old
  groups = {
    key: list(rows) for key, rows in itertools.groupby(old, attacks_table.key)
  }
  groups[attacks_table.key(new[0])] = new
  return [row for rows in groups.values() for row in rows]


_COLUMNS = (
  "system",
  "iterations",
  "ms_per_iteration_per_image",
  "seconds_per_image",
  "psnr_db_median",
  "psnr_db_min",
  "success_rate",
  "compile_seconds",
)


def _print_rows(rows: list[Row]) -> None:
  print("  ".join(_COLUMNS))
  for values in rows:
    cells = (
      f"{values[c]:.4g}" if isinstance(values[c], float) else str(values[c])
      for c in _COLUMNS
    )
    padded = zip(cells, _COLUMNS, strict=True)
    print("  ".join(cell.ljust(len(c)) for cell, c in padded))


def _progress(number: int, total: int, rows: list[Row], began: float) -> str:
  """One line on a comparison that is done."""
  results = "; ".join(
    f"{r['system']} {r['iterations']:.0f} steps in"
    f" {r['seconds_per_image']:.3g} s, {r['psnr_db_median']:.1f} dB"
    for r in rows
  )
  return (
    f"[{number}/{total}] {rows[0]['attack']} {rows[0]['model']},"
    f" {rows[0]['images']} images: {results}"
    f" ({time.perf_counter() - began:.0f} s)"
  )


def _read(path: str | None) -> list[Row]:
  file = pathlib.Path(path) if path else None
  return json.loads(file.read_text()) if file and file.exists() else []


def _write(path: str | None, rows: list[Row]) -> None:
  if path:
    file = pathlib.Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(rows, indent=2) + "\n")


def parser() -> argparse.ArgumentParser:
  """The flags."""
  flags = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  flags.add_argument("--attack", default="dlg")
  flags.add_argument("--model", default="lenet_zhu")
  flags.add_argument("--dataset", default="cifar10_sample")
  flags.add_argument("--images", type=int, default=8)
  flags.add_argument("--first", type=int, default=0, help="Test image.")
  flags.add_argument(
    "--iterations", type=int, default=0, help="0: each system's default."
  )
  flags.add_argument(
    "--labels_known", action="store_true", help="Systems get the labels."
  )
  flags.add_argument("--search", default="", help="Of inverting_gradients.")
  flags.add_argument("--seed", type=int, default=0)
  flags.add_argument("--devices", type=int, default=2, help="CPU devices.")
  flags.add_argument("--gpu", action="store_true", help="On the first GPU.")
  flags.add_argument("--repeats", type=int, default=1)
  flags.add_argument(
    "--peers",
    help=f"Of: {', '.join(PEERS)}. Default none, with --suite all.",
  )
  flags.add_argument("--peers_dir", default=".venv-peers")
  flags.add_argument(
    "--suite",
    nargs="?",
    const=SUITE,
    metavar="ATTACK(model=NAME,images=N,iterations=N,search=NAME),...",
    help=f"Several comparisons. Without a value: {SUITE}",
  )
  flags.add_argument("--json", help="Also write the rows to this file.")
  flags.add_argument("--page", help="Put the table of --json into this page.")
  flags.add_argument("--worker", help=argparse.SUPPRESS)
  flags.add_argument("--folder", help=argparse.SUPPRESS)
  return flags


def _main(args: argparse.Namespace) -> None:
  names = ",".join(PEERS) if args.suite else ""
  names = names if args.peers is None else args.peers
  peers = [peer for peer in names.split(",") if peer]
  if args.page and not args.json:
    raise errors.UserError("--page: expected --json, the file of its rows.")
  if args.suite:
    comparisons = suite(args.suite, args.images)
    for comparison in comparisons:
      check(comparison, peers, args.gpu)
    for i, comparison in enumerate(comparisons):
      began = time.perf_counter()
      rows = compare(args, comparison, peers)
      _write(args.json, merge(_read(args.json), rows))
      print(_progress(i + 1, len(comparisons), rows, began), flush=True)
  elif not args.page:
    comparison = Comparison(
      args.attack,
      args.model,
      args.images,
      args.iterations,
      args.labels_known,
      args.search,
    )
    check(comparison, peers, args.gpu)
    rows = compare(args, comparison, peers)
    _print_rows(rows)
    _write(args.json, rows)
  if args.page:
    block = "beside on a GPU" if args.gpu else "beside"
    page.put(
      pathlib.Path(args.page), block, attacks_table.markdown(_read(args.json))
    )


def main() -> None:
  """Runs a comparison, a suite of them, or one system's process."""
  flags = parser()
  args = flags.parse_args()
  if args.worker:
    _worker(args)
    return
  try:
    _main(args)
  except errors.UserError as error:
    flags.error(str(error))


if __name__ == "__main__":
  main()
