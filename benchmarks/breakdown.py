"""Where the time of a round goes: XLA's operations, by what they do.

    python -m benchmarks.breakdown --model=cnn --page=docs/performance.md

Runs our row of `benchmarks.federated` under JAX's profiler and adds up the
seconds that devices spend in each compiled operation. What an operation does is
in its name in the program: the layer, forward pass or gradient.
"""

import argparse
import collections
from collections.abc import Iterator
import gzip
import json
import pathlib
import re
import tempfile
from typing import Any

import numpy as np

from benchmarks import federated, federated_task, page

_METADATA = re.compile(r'%?([\w.-]+) = .*?op_name="([^"]*)"')


def names(program: str) -> dict[str, str]:
  """Instruction -> its name in the traced Python program."""
  return dict(_METADATA.findall(program))


def events(folder: pathlib.Path) -> Iterator[dict[str, Any]]:
  """The complete events of a trace that name a compiled operation."""
  for file in folder.glob("plugins/profile/*/*.trace.json.gz"):
    trace = json.loads(gzip.decompress(file.read_bytes()))
    for event in trace["traceEvents"]:
      if event.get("ph") == "X" and "hlo_op" in event.get("args", {}):
        yield event


def kind(op: str) -> str:
  """What an operation of this name does, for the table."""
  backward = "transpose(" in op
  layer = re.search(r"(conv|dense)\d", op)
  if layer is None:
    return "batches, SGD step, sums"
  what = "pooling" if "pool" in op else "layer"
  return f"{layer[0]}, {what}, {'gradients' if backward else 'forward'}"


def seconds(folder: pathlib.Path) -> dict[str, float]:
  """Seconds by kind, of all devices together."""
  of = names((folder / "program.txt").read_text())
  found: dict[str, float] = collections.defaultdict(float)
  for event in events(folder / "trace"):
    op = event["args"]["hlo_op"]
    # These enclose others, which are counted.
    if not op.startswith(("while", "call", "conditional")):
      found[kind(of.get(op, ""))] += event["dur"] / 1e6
  return dict(found)


def macs(model: str) -> dict[str, tuple[float, float]]:
  """Layer -> products of a step, forward and of both gradients."""
  batch = federated_task.BATCH
  # Images need no gradient.
  return {
    name: (batch * count, batch * count * (1 if i == 0 else 2))
    for i, (name, count) in enumerate(
      federated_task.layer_products(model).items()
    )
  }


def markdown(
  model: str, clients: int, busy: dict[str, float], wall: float, peak: float
) -> str:
  """The table: milliseconds of a device in one step, rate, share of the peak.

  Args:
    model: the benchmark's.
    clients: trained in all rounds of the trace.
    busy: from `seconds`.
    wall: of these rounds, times devices.
    peak: float32 matrix product of one device, GFLOP/s.
  """
  steps = clients * federated_task.EXAMPLES // federated_task.BATCH
  work = {
    f"{name}, layer, {way}": 2 * count
    for name, both in macs(model).items()
    for way, count in zip(("forward", "gradients"), both, strict=True)
  }
  lines = [
    f"| `{model}`, what | ms a step | GFLOP/s | of the product |",
    "| :-- | --: | --: | --: |",
  ]
  for name, spent in sorted(busy.items(), key=lambda item: -item[1]):
    rate = work.get(name, 0) * steps / spent / 1e9
    cells = (f"{rate:.0f}", f"{rate / peak:.0%}") if rate else ("", "")
    lines.append(
      f"| {name} | {1e3 * spent / steps:.2f} | {cells[0]} | {cells[1]} |"
    )
  idle = wall - sum(busy.values())
  lines += [
    f"| between operations, waiting for the other device |"
    f" {1e3 * idle / steps:.2f} | | |",
    f"| a step | {1e3 * wall / steps:.2f} |"
    f" {sum(work.values()) * steps / wall / 1e9:.0f} |"
    f" {sum(work.values()) * steps / wall / 1e9 / peak:.0%} |",
  ]
  return "\n".join(lines)


def main() -> None:
  """Runs the round under the profiler and prints, or puts, the table."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
  models = tuple(federated_task.ARCHITECTURES)
  parser.add_argument("--model", choices=models, default="cnn")
  parser.add_argument("--clients", type=int, default=40)
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--plan", default="auto")
  parser.add_argument("--devices", type=int)
  parser.add_argument("--page", type=pathlib.Path, help="page to put it into")
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    task = federated_task.make(args.model, args.clients)
    np.savez(folder / "task.npz", **task)  # type: ignore[arg-type]
    federated.launch(*federated.command(args, "peak", "", folder))
    peak = json.loads((folder / "peak.json").read_text())
    command, env = federated.command(args, "mpqfl_jax", args.plan, folder)
    federated.launch([*command, "--trace"], env)
    answer = json.loads((folder / "answer.json").read_text())
    busy = seconds(folder)
  devices = int(answer["plan"].split()[-2])
  table = markdown(
    args.model,
    args.clients * args.rounds,
    busy,
    devices * sum(answer["seconds"][1:]),
    peak / devices,
  )
  print(table)
  if args.page:
    page.put(args.page, f"breakdown {args.model}", table)


if __name__ == "__main__":
  main()
