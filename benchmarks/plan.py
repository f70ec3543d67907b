"""What a round of many clients costs on accelerators: a model, on paper.

    python -m benchmarks.plan --page=docs/scaling.md
    python -m benchmarks.plan --page=docs/scaling.md --federated=FILE.json --sum

The first computes the tables of the plan from formulas, published figures of
the accelerators and a count of a client's operations; nothing in it was timed.
The second also puts in what was measured here: rows of `benchmarks.federated`,
from one JSON file or more, and how long two processes take over gloo to add an
update over their devices.
"""

import argparse
from collections.abc import Iterable
import json
import pathlib
import socket
import subprocess
import sys
import time
from typing import NamedTuple

import jax
from jax.sharding import PartitionSpec
import numpy as np

from benchmarks import federated_task, page
from mpqfl_jax import distributed, engine, models, sharding, trees

CLIENTS = 1_000_000
COUNTS = (8, 64)
UTILISATIONS = (0.02, 0.1, 0.3)
MODELS = ("lenet_zhu", "cnn")
# An engine.ClientReport: loss, norm and bytes of 4 each, two flags.
REPORT_BYTES = 14


class Accelerator(NamedTuple):
  """Published figures of one accelerator.

  Attributes:
    name: of the product.
    flops: peak of products of float32 that are exact to float32 (`exact`),
      operations a second.
    link: bytes a second to a neighbour on another host, one way.
    source: of both.
  """

  name: str
  flops: float
  link: float
  source: str


ACCELERATORS = (
  Accelerator(
    "H100 SXM",
    66.9e12,
    50e9,
    "float32, the data sheet's figure; 400 Gb/s of network for each GPU, as in"
    " a DGX H100",
  ),
  Accelerator(
    "TPU v5e",
    197e12 / 6,
    50e9,
    "a sixth of bfloat16's, for a product of float32 is six of them; 1,600 Gb/s"
    " over four links to other chips, of which one counts",
  ),
)


class Work(NamedTuple):
  """One model's client: parameters, operations of its local training."""

  parameters: int
  flops: float


def work(name: str) -> Work:
  """Counts a client's operations as `benchmarks.federated` does."""
  mean, std = np.full(1, 0.5), np.full(1, 0.5)
  side = federated_task.SIDE
  shape = (side, side, 1)
  model = models.make(name, shape, federated_task.CLASSES, mean, std, "xla")
  params = jax.eval_shape(model.init, jax.random.key(0))
  return Work(trees.size(params), federated_task.flops_per_client(name))


class Cost(NamedTuple):
  """Seconds of a round."""

  compute: float
  sum: float
  report: float


def cost(
  work: Work, clients: int, device: Accelerator, count: int, utilisation: float
) -> Cost:
  """The model: see docs/scaling.md for each formula.

  Args:
    work: of one client.
    clients: in the round.
    device: one accelerator.
    count: how many there are.
    utilisation: share of the peak that local training reaches.
  """
  ring = (count - 1) / count
  return Cost(
    compute=clients * work.flops / (count * device.flops * utilisation),
    sum=2 * ring * 4 * work.parameters / device.link,
    report=ring * REPORT_BYTES * clients / device.link,
  )


def plan_table() -> str:
  """Markdown: a million-client round by model, accelerator and number."""
  works = {name: work(name) for name in MODELS}
  rows = [
    "| Model | GFLOP a client | Accelerators |"
    + "".join(f" Compute at {u:.0%}, s |" for u in UTILISATIONS)
    + " Sum, ms | Reports, ms |",
    "| :-- | --: | :-- |" + " --: |" * (len(UTILISATIONS) + 2),
  ]
  for name, each in works.items():
    for device in ACCELERATORS:
      for count in COUNTS:
        costs = [cost(each, CLIENTS, device, count, u) for u in UTILISATIONS]
        rows.append(
          f"| {name} | {each.flops / 1e9:.3g} | {count} x {device.name} |"
          + "".join(f" {c.compute:,.3g} |" for c in costs)
          + f" {costs[0].sum * 1e3:.2g} | {costs[0].report * 1e3:.2g} |"
        )
  return "\n".join(rows)


def measured_table(results: Iterable[dict]) -> str:
  """Markdown: rows of `benchmarks.federated --json`, and their utilisation."""
  ours = [r for r in results if r["system"] == "mpqfl_jax"]
  hosts = sorted({f"{r['cpu']}, {r['cores']} cores" for r in ours})
  rows = [
    f"On {'; '.join(hosts)}:",
    "",
    "| Model | Clients | Plan | Updates a second | Share of the measured matmul"
    " peak | A million clients, minutes |",
    "| :-- | --: | :-- | --: | --: | --: |",
  ]
  for r in ours:
    rate, peak = r["client_updates_per_second"], r["matmul_peak_gflops"]
    rows.append(
      f"| {r['model']} | {r['clients']:,} | {r['plan']} | {rate:,.1f} |"
      f" {r['gflops'] / peak:.0%} | {CLIENTS / rate / 60:,.0f} |"
    )
  return "\n".join(rows)


def time_sums(repetitions: int = 10) -> list[dict]:
  """Times the sum of an update over all devices, this process being one."""
  mesh = engine.mesh()
  count = mesh.devices.size
  split = PartitionSpec(engine.AXIS)
  found = []
  for name in MODELS:
    size = work(name).parameters
    mine = sharding.put(np.ones((count, size), np.float32), mesh, split)
    add = jax.jit(
      jax.shard_map(
        lambda x: sharding.ordered_sum(x[0], engine.AXIS, count),
        mesh=mesh,
        in_specs=split,
        out_specs=PartitionSpec(),
        check_vma=False,
      )
    )
    jax.block_until_ready(add(mine))
    times = []
    for _ in range(repetitions):
      begin = time.perf_counter()
      jax.block_until_ready(add(mine))
      times.append(time.perf_counter() - begin)
    found.append(
      {
        "model": name,
        "devices": count,
        "bytes": 4 * size,
        "seconds": min(times),
      }
    )
  return found


def _sum_in_two() -> list[dict]:
  """`time_sums` over two processes of one device each on this machine."""
  with socket.create_server(("", 0)) as server:
    port = server.getsockname()[1]
  command = [sys.executable, "-m", "benchmarks.plan", f"--port={port}"]
  workers = [
    subprocess.Popen([*command, f"--worker={i}"], stdout=subprocess.PIPE)
    for i in range(2)
  ]
  outputs = [worker.communicate()[0] for worker in workers]
  if any(worker.returncode for worker in workers):
    raise RuntimeError("a worker failed; what it said is above")
  return json.loads(outputs[0].splitlines()[-1])


def _work_for_two(port: int, index: int) -> None:
  jax.config.update("jax_num_cpu_devices", 1)
  group = distributed.join(f"localhost:{port}", 2, index, 60, "")
  found = time_sums()
  group.finish()
  print(json.dumps(found))


def sum_table(sums: Iterable[dict]) -> str:
  """Markdown: measured times of the sum, and the rate that they amount to."""
  rows = [
    "| Update of | Bytes | Two processes over gloo, ms | GB/s each way |",
    "| :-- | --: | --: | --: |",
  ]
  for s in sums:
    sent = 2 * (s["devices"] - 1) / s["devices"] * s["bytes"]
    rows.append(
      f"| {s['model']} | {s['bytes']:,} | {s['seconds'] * 1e3:.1f} |"
      f" {sent / s['seconds'] / 1e9:.2f} |"
    )
  return "\n".join(rows)


def main() -> None:
  """Prints the tables, and puts them into a page where one is named."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
  parser.add_argument("--page", type=pathlib.Path, help="page to change")
  parser.add_argument(
    "--federated",
    type=pathlib.Path,
    nargs="+",
    default=[],
    help="JSON files of benchmarks.federated",
  )
  parser.add_argument("--sum", action="store_true", help="time sums over gloo")
  parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
  parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
  flags = parser.parse_args()
  if flags.worker is not None:
    _work_for_two(flags.port, flags.worker)
    return
  blocks = {"plan": plan_table()}
  if flags.federated:
    files = [json.loads(path.read_text()) for path in flags.federated]
    blocks["measured"] = measured_table(row for rows in files for row in rows)
  if flags.sum:
    blocks["sum"] = sum_table(_sum_in_two())
  for text in blocks.values():
    print(text, end="\n\n")
  if flags.page:
    for block, text in blocks.items():
      page.put(flags.page, block, text)


if __name__ == "__main__":
  main()
