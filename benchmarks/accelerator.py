"""What pays on this machine's accelerator: plans, lanes of attacks, codecs.

    python -m benchmarks.accelerator --json=results/accelerator.json \
      --page=docs/performance.md

Everything is measured in one process on one device, the first that JAX has, at
float32 precision and at the precision that JAX takes by default where that is
another (TF32 on recent GPUs, bfloat16 on TPUs).

training   rounds of the work of `benchmarks.federated` for each number of
           clients side by side and each form of convolution; the weights after
           the first round are compared with NumPy's in float64.
attacks    searches on undefended updates of test images, for each number of
           lanes and each form; the bytes of a lane, as the compiled program
           says, beside what `lane_bytes` says.
codecs     encoding, packed, and decoding of an update, as a share of a copy
           of it on the device.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
import itertools
import json
import os
import pathlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import attacks_task, federated_ours, federated_task, page
from mpqfl_jax import (
  attacks,
  engine,
  host,
  metrics,
  models,
  precision,
  specs,
  trees,
)
from mpqfl_jax.attacks import runner
from mpqfl_jax.report import tables
from mpqfl_jax.types import Observation

Row = dict[str, Any]
# Programs are compiled beside one another, but measured alone.
COMPILERS = 12
# Iterations of a search between two looks at the host.
CHUNK = 100


class Training(NamedTuple):
  """A case of the section `training`."""

  model: str
  clients: int
  size: int
  conv: str
  precision: str


class Search(NamedTuple):
  """A case of the section `attacks`."""

  model: str
  attack: str
  lanes: int
  conv: str
  precision: str


def _words(error: Exception) -> str:
  return f"{type(error).__name__}: {error}"[:300]


def _bytes(compiled: Any) -> dict[str, int]:
  """What a compiled program needs on the device."""
  found = compiled.memory_analysis()
  return {
    "argument_bytes": found.argument_size_in_bytes,
    "temporary_bytes": found.temp_size_in_bytes,
  }


def training(cases: list[Training], rounds: int, limit: float) -> Iterator[Row]:
  """A row a case: updates a second, error of the checked round, bytes.

  Args:
    cases: what to measure.
    rounds: timed, after the checked one.
    limit: seconds; a case whose checked round takes longer is timed no more.
  """
  mesh = engine.mesh(1)
  groups = list(dict.fromkeys((c.model, c.clients) for c in cases))
  for model, clients in groups:
    task = federated_task.make(model, clients)
    want = federated_task.expected(model, task)
    mine = [c for c in cases if (c.model, c.clients) == (model, clients)]

    def compiled(case: Training, task=task):
      plan = engine.Plan("chunk", case.size, case.conv, "")
      with jax.default_matmul_precision(case.precision):
        ready = federated_ours.trainer(case.model, task, plan, mesh)
        began = time.perf_counter()
        program = ready.fn.lower(*ready.first()).compile()
      return ready, program, time.perf_counter() - began

    with futures.ThreadPoolExecutor(COMPILERS) as pool:
      jobs = [pool.submit(compiled, case) for case in mine]
      futures.wait(jobs)
    for case, job in zip(mine, jobs, strict=True):
      try:
        ready, program, compiling = job.result()
        seconds, weights = federated_ours.train(ready, program, 1)
        if seconds[0] < limit:
          seconds += federated_ours.train(ready, program, rounds)[0]
      except Exception as error:  # A plan that does not fit is a finding.
        yield case._asdict() | {"failed": _words(error)}
        continue
      best = min(seconds[1:] or seconds)
      flops = federated_task.flops_per_client(model)
      yield case._asdict() | {
        "seconds_per_round": best,
        "client_updates_per_second": clients / best,
        "gflops": clients * flops / best / 1e9,
        "update_error": federated_task.error(task, weights, want),
        "compile_seconds": compiling,
        **_bytes(program),
      }


def searches(cases: list[Search], dataset: str, first: int) -> Iterator[Row]:
  """A row a case: seconds an image, what was found, bytes of a lane."""

  def ready(case: Search):
    model, params, data = attacks_task.make(case.model, dataset, 0, case.conv)
    rows = slice(first, first + case.lanes)
    x = data.x_test[rows] / np.float32(255)
    y = np.asarray(data.y_test[rows])
    with jax.default_matmul_precision("float32"):
      observation = attacks_task.observed(
        model, params, x, y, labels_known=True
      )
    kind, settings = specs.parse(case.attack)
    attack = attacks.make(
      kind, model, auxiliary=np.asarray(data.x_train), **settings
    )

    def run():
      with jax.default_matmul_precision(case.precision):
        return attacks.run(
          attack,
          observation,
          jax.random.key(0),
          devices=jax.devices()[:1],
          width=case.lanes,
          chunk=CHUNK,
          progress=False,
        )

    return run, attack, model, observation, x, run()

  # Beside one another only to compile: what counts runs alone.
  with futures.ThreadPoolExecutor(COMPILERS) as pool:
    jobs = [pool.submit(ready, case) for case in cases]
    futures.wait(jobs)
  for case, job in zip(cases, jobs, strict=True):
    try:
      run, attack, model, observation, x, warm = job.result()
      found = run()
    except Exception as error:
      yield case._asdict() | {"failed": _words(error)}
      continue
    program = runner._program(
      attack, tuple(jax.devices()[:1]), case.lanes, CHUNK
    ).compiled
    advance = next(v for k, v in program.items() if k[0] == "advance")
    psnr = metrics.psnr_db(x, found.x[:, 0])
    single = jax.tree.map(lambda a: a[0], observation)
    activations = models.activations(model)
    yield case._asdict() | {
      "seconds": found.seconds,
      "seconds_per_image": found.seconds / case.lanes,
      "steps": float(found.iterations.mean()),
      "ms_per_step": 1e3 * found.seconds / found.iterations.max(),
      "psnr_db_median": float(np.median(psnr)),
      "success_rate": metrics.success_rate(psnr).rate,
      "compile_seconds": warm.compile_seconds,
      "parameters": trees.size(single.params),
      "activations": activations,
      "lane_bytes": lane_bytes(attack, single, activations),
      **_bytes(advance),
    }


CODECS = (
  "float16,float8,int8,int8(mode=affine),int4,int2,int8(rounding=stochastic),"
  "int4(rounding=stochastic),nf4,sign,qsgd,drive,topk(ratio=0.01)"
)


def codecs(names: str, elements: int, calls: int = 20) -> Iterator[Row]:
  """A row a codec: GB/s of encoding and decoding, and of a copy."""

  def fastest(fn: Callable, argument: Any) -> float:
    # Several in flight: only the device's time is to be measured.
    jax.block_until_ready([fn(argument) for _ in range(3)])
    times = []
    for _ in range(5):
      began = time.perf_counter()
      jax.block_until_ready([fn(argument) for _ in range(calls)])
      times.append((time.perf_counter() - began) / calls)
    return min(times)

  x = jax.random.normal(jax.random.key(0), (elements,))
  seed = jnp.array([1, 2], jnp.uint32)
  copy = 8 * elements / fastest(jax.jit(lambda x: x + 1), x) / 1e9
  yield {"codec": "copy", "gb_s": copy}
  for spec in specs.split(names):
    name, options = specs.parse(spec)
    leaf = precision.leaf_codec(name, (elements,), options)
    encode = jax.jit(lambda x, leaf=leaf: leaf.encode(seed, x, leaf.init())[0])
    decode = jax.jit(leaf.decode)
    payload = encode(x)
    sent = int(leaf.num_bytes(payload))
    rates = [
      (4 * elements + sent) / fastest(fn, argument) / 1e9
      for fn, argument in ((encode, x), (decode, payload))
    ]
    yield {
      "codec": spec,
      "bytes": sent,
      "encode_gb_s": rates[0],
      "decode_gb_s": rates[1],
      "encode_of_copy": rates[0] / copy,
      "decode_of_copy": rates[1] / copy,
    }


def lane_bytes(
  attack: attacks.Attack, observation: Observation, activations: int
) -> int:
  """The most that a lane of a search takes, by the formula of docs/attacks.md.

  Args:
    attack: what searches.
    observation: of one update.
    activations: numbers of a forward pass of one image (`models.activations`).
  """
  state = jax.eval_shape(attack.init, jax.random.key(0), observation)
  # The state is there twice where lanes advance in lockstep; a simulated
  # update, its target and what leads back to the images are as large as the
  # parameters.
  numbers = 2 * trees.size(state) + 6 * trees.size(observation.params)
  return 4 * (numbers + 2 * attack.images * activations)


def _figure(value: float) -> str:
  return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def markdown(rows: list[Row]) -> str:
  """The tables of all sections that there are rows of."""
  parts = []
  for section, (head, cells) in _TABLES.items():
    mine = [r for r in rows if r["section"] == section]
    if not mine:
      continue
    lines = [list(head), [":--", *["--:"] * (len(head) - 1)]]
    for row in mine:
      shown = [cells[0](row)]
      shown += ["" if "failed" in row else cell(row) for cell in cells[1:]]
      lines.append(shown)
    parts.append(tables.joined(lines))
  where = [
    f"{r['device']}, jax {r['jax']}, XLA's flags `{r['xla_flags'] or 'none'}`"
    for r in rows
  ]
  return "\n\n".join((*parts, "; ".join(dict.fromkeys(where)) + "."))


def _share(name: str) -> Callable[[Row], str]:
  return lambda row: (
    f"{row[f'{name}_gb_s']:,.0f} ({row[f'{name}_of_copy']:.0%})"
    if f"{name}_gb_s" in row
    else f"{row['gb_s']:,.0f}"
  )


def _megabytes(row: Row) -> str:
  used = row["argument_bytes"] + row["temporary_bytes"]
  return _figure(used / row["lanes"] / 1e6)


# Section -> headings, and what stands below each.
_TABLES: dict[str, tuple[tuple[str, ...], tuple[Callable[[Row], str], ...]]] = {
  "training": (
    (
      *("Model, clients", "Side by side", "Form", "Products in"),
      *("Updates/s", "GFLOP/s", "Off NumPy's update by", "Temporary, MB"),
    ),
    (
      lambda r: f"`{r['model']}`, {r['clients']:,}",
      lambda r: str(r["size"]),
      lambda r: r["conv"],
      lambda r: r["precision"],
      lambda r: f"{r['client_updates_per_second']:,.0f}",
      lambda r: f"{r['gflops']:,.0f}",
      lambda r: f"{r['update_error']:.0e}",
      lambda r: f"{r['temporary_bytes'] / 1e6:,.0f}",
    ),
  ),
  "attacks": (
    (
      *("Search", "Lanes", "Form", "Products in", "Steps", "ms a step"),
      *("s an image", "Median PSNR, dB", "MB a lane", "at most, by formula"),
    ),
    (
      lambda r: f"`{r['model']}`: `{r['attack']}`",
      lambda r: str(r["lanes"]),
      lambda r: r["conv"],
      lambda r: r["precision"],
      lambda r: f"{r['steps']:,.0f}",
      lambda r: _figure(r["ms_per_step"]),
      lambda r: _figure(r["seconds_per_image"]),
      lambda r: f"{r['psnr_db_median']:.1f}",
      _megabytes,
      lambda r: _figure(r["lane_bytes"] / 1e6),
    ),
  ),
  "codecs": (
    ("Codec", "Encoding, GB/s (of a copy)", "Decoding, GB/s (of a copy)"),
    (lambda r: f"`{r['codec']}`", _share("encode"), _share("decode")),
  ),
}


def _put(rows: list[Row], path: pathlib.Path) -> None:
  """Puts each section's table into its page's block."""
  for section in dict.fromkeys(row["section"] for row in rows):
    mine = [row for row in rows if row["section"] == section]
    page.put(path, f"accelerator {section}", markdown(mine))


def measured(
  section: str, rows: Iterable[Row], into: list[Row], path: str | None
) -> None:
  """Prints each row as soon as it is there, and writes all of them."""
  where = {
    "section": section,
    "device": jax.devices()[0].device_kind,
    "jax": jax.__version__,
    "xla_flags": os.environ.get("XLA_FLAGS", ""),
  }
  for row in rows:
    into.append(where | row)
    print(
      " ".join(
        f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}"
        for k, v in row.items()
      ),
      flush=True,
    )
    if path:
      pathlib.Path(path).write_text(json.dumps(into, indent=2) + "\n")


def main() -> None:
  """Measures the sections that the flags ask for."""
  flags = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  flags.add_argument("--sections", default="training,attacks,codecs")
  flags.add_argument("--precisions", default="float32,tensorfloat32")
  flags.add_argument("--forms", default="xla,slices")
  flags.add_argument("--models", default="lenet_zhu,cnn", help="trained")
  flags.add_argument("--clients", default="1000", help="in a round")
  flags.add_argument("--sizes", default="1,8,32,128,512", help="side by side")
  flags.add_argument("--rounds", type=int, default=3)
  flags.add_argument("--limit", type=float, default=10.0, help="s a round")
  flags.add_argument(
    "--searches", default="lenet_zhu:dlg,lenet_zhu:map(iterations=200)"
  )
  flags.add_argument("--lanes", default="1,32,128")
  flags.add_argument("--dataset", default="cifar10_sample")
  flags.add_argument("--first", type=int, default=400, help="test image")
  flags.add_argument("--codecs", default=CODECS)
  flags.add_argument("--elements", type=int, default=100_000_000)
  flags.add_argument("--json", help="file to write")
  flags.add_argument(
    "--page", help="put the tables into it; without --sections, from the file"
  )
  args = flags.parse_args()

  def words(text: str) -> list[str]:
    return list(specs.split(text))

  def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]

  sections, precisions, forms = (
    words(text) for text in (args.sections, args.precisions, args.forms)
  )
  rows: list[Row] = []
  if args.page and args.json and not sections:
    rows = json.loads(pathlib.Path(args.json).read_text())
  if "training" in sections:
    cases = [
      Training(*case)
      for case in itertools.product(
        words(args.models),
        numbers(args.clients),
        numbers(args.sizes),
        forms,
        precisions,
      )
      if case[2] <= case[1]
    ]
    measured(
      "training", training(cases, args.rounds, args.limit), rows, args.json
    )
  if "attacks" in sections:
    found = []
    for search, lanes, form, precision_ in itertools.product(
      words(args.searches), numbers(args.lanes), forms, precisions
    ):
      model, _, attack = search.partition(":")
      found.append(Search(model, attack, lanes, form, precision_))
    measured(
      "attacks", searches(found, args.dataset, args.first), rows, args.json
    )
  if "codecs" in sections:
    measured("codecs", codecs(args.codecs, args.elements), rows, args.json)
  print(markdown(rows))
  if args.page:
    _put(rows, pathlib.Path(args.page))


if __name__ == "__main__":
  host.restart()
  main()
