"""How many clients a second a round of federated averaging trains.

    python -m benchmarks.federated --model=lenet_zhu --clients=100 --rounds=5 \
      --peers=fedjax,pfl,flower,torch --json=FILE

The work: clients of 64 images of 28x28x1, batches of 16, one epoch of SGD at
rate 0.05, the mean of the clients' weights, float32. Every system runs in a
process of its own, peers in environments of their own (`make bench-peers`), one
after the other and over again (`--repeats`), so that a busy machine slows all
of them; the best round of a system after its first counts. The weights that a
system has after its first round must be those of the same round in NumPy and
float64: all start from the same weights and visit the same batches there, so
that nobody is faster by doing less.

Our row runs what `experiments.main` runs: the engine under `--plan` on
`--devices` devices, per-client randomness, reports, the float32 codec and the
settings of `mpqfl_jax.host` included. `matmul_peak_gflops` is the best of
NumPy's and JAX's square float32 product in this run, on all cores;
`peak_rss_mb` sums over a system's processes.
"""

import argparse
from collections.abc import Iterator
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

import numpy as np

from benchmarks import federated_task

PEERS = ("fedjax", "pfl", "flower", "torch")
# Of the length of the update. Sums of a thousand float32 weights, as torch's
# plain loop makes them, are off by 2e-3; a step left out is a quarter.
TOLERANCE = 5e-3
Row = dict[str, Any]


def ours(args: argparse.Namespace, folder: pathlib.Path) -> None:
  """The package's engine, as `experiments.main` sets it up."""
  import jax

  jax.config.update("jax_num_cpu_devices", args.devices or os.cpu_count())
  from benchmarks import federated_ours
  from mpqfl_jax import engine, exact

  task = dict(np.load(folder / "task.npz"))
  mesh = engine.mesh(args.devices)
  plan = engine.resolve(
    args.plan,
    mesh,
    len(task["y"]),
    lambda conv: federated_ours.network(args.model, task, conv),
    federated_task.BATCH,
  )
  trainer = federated_ours.trainer(args.model, task, plan, mesh)

  def started(number: int) -> None:
    if args.trace and number == 1:
      program = trainer.fn.lower(*trainer.first()).compile()
      (folder / "program.txt").write_text(str(program.as_text()))
      jax.profiler.start_trace(folder / "trace")

  with exact.products():
    seconds, weights = federated_ours.train(
      trainer, trainer.fn, args.rounds + 1, started
    )
  if args.trace:
    jax.profiler.stop_trace()
  np.savez(folder / "answer.npz", **weights)  # type: ignore[arg-type]
  from importlib import metadata

  versions = [
    f"{name} {metadata.version(name)}" for name in ("mpqfl_jax", "jax")
  ]
  size = f"(size={plan.size})" if plan.name == "chunk" else ""
  answer = {
    "seconds": seconds,
    "plan": f"{plan.name}{size}, {plan.conv}, {mesh.devices.size} devices",
    "version": ", ".join(versions),
  }
  (folder / "answer.json").write_text(json.dumps(answer))


def peak(folder: pathlib.Path) -> None:
  """The fastest float32 matrix product of NumPy and of JAX, all cores."""
  import jax

  from mpqfl_jax import exact

  best = 0.0
  for side in (1024, 2048, 4096):
    a = np.random.default_rng(0).random((side, side), np.float32)
    on_device = jax.numpy.asarray(a)
    with exact.products():
      product = jax.jit(lambda a: a @ a).lower(on_device).compile()
    for run in (
      lambda a=a: a @ a,
      lambda f=product, a=on_device: jax.block_until_ready(f(a)),
    ):
      run()
      for _ in range(5):
        began = time.perf_counter()
        run()
        best = max(best, 2 * side**3 / (time.perf_counter() - began) / 1e9)
  (folder / "peak.json").write_text(json.dumps(best))


def _tree(root: int) -> Iterator[int]:
  """A process and all that descend from it."""
  children: dict[int, list[int]] = {}
  for entry in pathlib.Path("/proc").iterdir():
    if entry.name.isdigit():
      try:
        fields = (entry / "stat").read_text().rpartition(")")[2].split()
      except OSError:
        continue
      children.setdefault(int(fields[1]), []).append(int(entry.name))
  found = [root]
  for process in found:
    found += children.get(process, [])
  return iter(found)


def _resident_mb(root: int) -> float:
  pages = 0
  for process in _tree(root):
    try:
      pages += int(
        pathlib.Path(f"/proc/{process}/statm").read_text().split()[1]
      )
    except OSError:
      continue
  return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def launch(command: list[str], env: dict[str, str]) -> float:
  """Runs a command to its end; its processes' peak memory, MB."""
  process = subprocess.Popen(
    command,
    env=env,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  most = 0.0
  ended = threading.Event()

  def watch():
    nonlocal most
    while not ended.wait(0.5):
      most = max(most, _resident_mb(process.pid))

  watcher = threading.Thread(target=watch)
  watcher.start()
  output = process.communicate()[0]
  ended.set()
  watcher.join()
  if process.returncode:
    raise SystemExit(f"{command[:3]} failed:\n{output[-4000:]}")
  return most


def command(
  args: argparse.Namespace, system: str, plan: str, folder: pathlib.Path
) -> tuple[list[str], dict[str, str]]:
  """How a system is started, and its environment."""
  env = dict(os.environ)
  shared = [str(folder), f"--model={args.model}", f"--rounds={args.rounds}"]
  if system not in PEERS:
    own = [sys.executable, "-m", "benchmarks.federated", f"--worker={system}"]
    own += [f"--folder={shared[0]}", *shared[1:], f"--plan={plan}"]
    from mpqfl_jax import host

    env |= host.variables()
    return own + ([f"--devices={args.devices}"] if args.devices else []), env
  binaries = args.peers_dir / system / "bin"
  if not (binaries / "python").exists():
    raise SystemExit(f"no {binaries / 'python'}: run `make bench-peers` first")
  script = str(pathlib.Path(__file__).with_name("federated_peers.py"))
  start = [str(binaries / "python"), script]
  if system == "pfl":
    env["OMP_NUM_THREADS"] = "1"
    count = os.cpu_count() or 1
    start = [str(binaries / "torchrun"), f"--nproc_per_node={count}", script]
  return [*start, system, *shared], env


def run(
  args: argparse.Namespace,
  system: str,
  plan: str,
  folder: pathlib.Path,
  want: federated_task.Arrays,
) -> Row:
  """One turn of a system: its row, the weights of its first round checked."""
  try:
    resident = launch(*command(args, system, plan, folder))
  except SystemExit as failure:
    # Its processes abort now and then as they end.
    if system != "pfl":
      raise
    print(f"{failure}\n{system}: once more", file=sys.stderr)
    resident = launch(*command(args, system, plan, folder))
  answer = json.loads((folder / "answer.json").read_text())
  found = np.load(folder / "answer.npz")
  error = federated_task.error(np.load(folder / "task.npz"), found, want)
  if not error < TOLERANCE:
    raise SystemExit(
      f"{system} did other work: its update after a round is off by"
      f" {error:.2g} of its length"
    )
  return {
    "system": system,
    "version": answer["version"],
    "model": args.model,
    "clients": args.clients,
    "plan": answer["plan"],
    "seconds": answer["seconds"][1:],
    "first_round_seconds": answer["seconds"][0],
    "peak_rss_mb": resident,
    "update_error": error,
  }


def merge(rows: list[Row], peak_gflops: float) -> list[Row]:
  """One row a system and plan, from all its turns."""
  from mpqfl_jax import host

  found: dict[tuple[str, str], list[Row]] = {}
  for row in rows:
    found.setdefault((row["system"], row["plan"]), []).append(row)
  merged = []
  for turns in found.values():
    seconds = [s for turn in turns for s in turn["seconds"]]
    best = min(seconds)
    model, clients = turns[0]["model"], turns[0]["clients"]
    flops = federated_task.flops_per_client(model)
    merged.append(
      {
        **{k: turns[0][k] for k in ("system", "version", "model", "clients")},
        "plan": turns[0]["plan"],
        "seconds_per_round": best,
        "seconds_per_round_median": statistics.median(seconds),
        "timed_rounds": len(seconds),
        "client_updates_per_second": clients / best,
        "gflops": clients / best * flops / 1e9,
        "matmul_peak_gflops": peak_gflops,
        "peak_rss_mb": min(turn["peak_rss_mb"] for turn in turns),
        "first_round_seconds": min(t["first_round_seconds"] for t in turns),
        "update_error": max(turn["update_error"] for turn in turns),
        "cpu": host.processor(),
        "cores": os.cpu_count(),
      }
    )
  return merged


def print_table(rows: list[Row]) -> None:
  """Prints rates, and the share of the matrix product's."""
  print(
    f"{'system':10} {'plan':32} {'updates/s':>9} {'median':>8} {'GFLOP/s':>8}"
    f" {'of peak':>7} {'RSS, MB':>8} {'first, s':>8} {'error':>8}"
  )
  for row in rows:
    median = row["clients"] / row["seconds_per_round_median"]
    print(
      f"{row['system']:10} {row['plan']:32}"
      f" {row['client_updates_per_second']:9.1f} {median:8.1f}"
      f" {row['gflops']:8.1f} {row['gflops'] / row['matmul_peak_gflops']:7.0%}"
      f" {row['peak_rss_mb']:8.0f} {row['first_round_seconds']:8.2f}"
      f" {row['update_error']:8.1e}"
    )
  print(f"float32 matrix product: {rows[0]['matmul_peak_gflops']:.0f} GFLOP/s")


def _parse() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
  models = tuple(federated_task.ARCHITECTURES)
  parser.add_argument("--model", choices=models, default="lenet_zhu")
  parser.add_argument("--clients", type=int, default=100)
  parser.add_argument("--rounds", type=int, default=5, help="timed, a turn")
  parser.add_argument("--repeats", type=int, default=1, help="turns")
  parser.add_argument("--plan", default="auto", help="ours; several by commas")
  parser.add_argument("--devices", type=int, help="ours; default one a core")
  parser.add_argument("--peers", default="", help=f"of {', '.join(PEERS)}")
  parser.add_argument("--json", default="", help="file to write")
  parser.add_argument(
    "--peers_dir", type=pathlib.Path, default=pathlib.Path(".venv-peers")
  )
  parser.add_argument("--worker", help=argparse.SUPPRESS)
  parser.add_argument("--trace", action="store_true", help=argparse.SUPPRESS)
  parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
  args = parser.parse_args()
  args.peers = [peer for peer in args.peers.split(",") if peer]
  for peer in args.peers:
    if peer not in PEERS:
      parser.error(f"unknown peer {peer!r}: expected {', '.join(PEERS)}")
  if args.peers and args.model == "mlp":
    parser.error("--model=mlp compares our plans: expected no --peers")
  return args


def main() -> None:
  """Runs the benchmark."""
  args = _parse()
  if args.worker:
    if args.worker == "peak":
      peak(args.folder)
    else:
      ours(args, args.folder)
    return
  rows, peaks = [], []
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    task = federated_task.make(args.model, args.clients)
    np.savez(folder / "task.npz", **task)  # type: ignore[arg-type]
    want = federated_task.expected(args.model, task)
    del task
    turns = [("mpqfl_jax", plan) for plan in specs_of(args.plan)]
    turns += [(peer, "") for peer in args.peers]
    for _ in range(args.repeats):
      for system, plan in turns:
        # Before every turn, for the best of them counts, as it does of turns.
        launch(*command(args, "peak", "", folder))
        peaks.append(json.loads((folder / "peak.json").read_text()))
        rows.append(run(args, system, plan, folder, want))
  rows = merge(rows, max(peaks))
  print_table(rows)
  if args.json:
    pathlib.Path(args.json).write_text(json.dumps(rows, indent=2) + "\n")


def specs_of(plans: str) -> list[str]:
  """The plans named by the flag; their arguments may hold commas."""
  from mpqfl_jax import specs

  return list(specs.split(plans))


if __name__ == "__main__":
  main()
