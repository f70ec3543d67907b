"""How fast an update is quantised, packed and read back.

    python -m benchmarks.quantize --elements=25000000 --peers=qwix,torch

Every system runs in a process of its own, one after the other and over again
(`--rounds`). A rate is the bytes read plus the bytes written of the task
(float32 in, codes and scales out, or the reverse) over the shortest time,
whatever passes over memory it took. `memcpy_gb_s` is what copying the same
float32 array reaches, on as many threads as do it best, taking turns with
encoding and decoding: a machine whose memory others share is now fast, now
slow, so that only the share of the copy beside it can be compared, whose median
over the rounds counts. Packing eight bits of codes in a byte is part of our
encoding; qwix's int4 counts as a byte an element, as JAX has it, and torch has
no int4, so that its row packs with tensor operations. `snr_db` shows that all
do the same work.

`mpqfl_jax` takes the native passes (`kernels=native`) of codecs that have them,
where they can be compiled, and says so where not; the peer `xla` is the same
codecs with all passes compiled by XLA.

Workers import nothing of this package but their own system, so that peers need
no more than themselves in their environments. All of them run with the
settings of `mpqfl_jax.host`: an allocator that keeps its memory, and XLA's
widest vectors. JAX computes in the thread that waits for it.
"""

import argparse
from collections.abc import Callable, Iterator
from concurrent import futures
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from typing import Any, NamedTuple

import numpy as np

# Repeated at least so often, so often in a row, and for so long in all: a
# process takes half a second to come to its speed.
REPETITIONS, BLOCK, SECONDS = 12, 4, 2.0
# A caller that waits for each result gains nothing from handing it to another
# thread, which costs 2% to 5% of the shortest rows.
_WAITING = {"JAX_CPU_ENABLE_ASYNC_DISPATCH": "false"}
# Codecs of ours whose passes need not be XLA's.
WITH_KERNELS = ("float16", "bfloat16", "float8", "int8", "int4", "int2")
Row = dict[str, Any]


class Task(NamedTuple):
  """A codec of a system.

  Attributes:
    codec: its title.
    encode: () -> payload.
    decode: payload -> array.
    size: payload -> bytes.
    kernels: what our own passes are compiled by; None of peers.
  """

  codec: str
  encode: Callable[[], Any]
  decode: Callable[[Any], Any]
  size: Callable[[Any], int]
  kernels: str | None = None


def best_seconds(*calls: Callable[[], Any]) -> list[float]:
  """The shortest run of each, taking turns, after one that compiles."""
  for call in calls:
    call()
  times: list[list[float]] = [[] for _ in calls]
  while len(times[0]) < REPETITIONS or sum(map(sum, times)) < SECONDS:
    for call, taken in zip(calls, times, strict=True):
      for _ in range(BLOCK):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
  return [min(taken) for taken in times]


def copies(x: np.ndarray) -> list[Callable[[], Any]]:
  """Ways to copy `x`: on one thread, and on as many as there are cores."""
  out = np.empty_like(x)
  threads = os.cpu_count() or 1
  parts = list(
    zip(np.array_split(out, threads), np.array_split(x, threads), strict=True)
  )
  pool = futures.ThreadPoolExecutor(threads)
  return [
    lambda: np.copyto(out, x),
    lambda: list(pool.map(lambda part: np.copyto(*part), parts)),
  ]


def ours(x: np.ndarray, kernels: str = "native") -> Iterator[Task]:
  """This package, each codec as one compiled function a direction.

  Args:
    x: what is encoded.
    kernels: of the codecs that have a choice; `native` where it is possible.
  """
  import jax
  import jax.numpy as jnp

  from mpqfl_jax import errors, native, precision

  if kernels == "native":
    try:
      native.load()
    except errors.UserError as error:
      print(f"Measured with kernels=xla. {error}", file=sys.stderr)
      kernels = "xla"
  array = jnp.asarray(x)
  seed = jnp.array([1, 2], jnp.uint32)
  cases: list[tuple[str, str, dict[str, Any]]] = [
    ("float16", "float16", {}),
    ("bfloat16", "bfloat16", {}),
    ("float8", "float8", {}),
    ("int8", "int8", {}),
    ("int8 affine", "int8", {"mode": "affine"}),
    ("int4", "int4", {}),
    ("int2", "int2", {}),
    ("int8 stochastic", "int8", {"rounding": "stochastic"}),
    ("int4 stochastic", "int4", {"rounding": "stochastic"}),
    ("nf4", "nf4", {}),
    ("sign", "sign", {}),
    ("qsgd", "qsgd", {}),
    ("drive", "drive", {}),
    ("topk", "topk", {"ratio": 0.01}),
  ]
  for title, name, options in cases:
    if name in WITH_KERNELS:
      options = options | {"kernels": kernels}
    leaf = precision.leaf_codec(name, x.shape, options)

    def encode_leaf(x: Any, leaf: Any = leaf) -> Any:
      return leaf.encode(seed, x, leaf.init())[0]

    encode = jax.jit(encode_leaf)
    decode = jax.jit(leaf.decode)

    def size(payload: Any, leaf: Any = leaf) -> int:
      return int(leaf.num_bytes(payload))

    yield Task(
      title,
      lambda: jax.block_until_ready(encode(array)),
      lambda payload: jax.block_until_ready(decode(payload)),
      size,
      options.get("kernels", "xla"),
    )


def xla(x: np.ndarray) -> Iterator[Task]:
  """This package, all passes compiled by XLA."""
  return ours(x, "xla")


def qwix(x: np.ndarray) -> Iterator[Task]:
  """qwix's own quantize and dequantize, compiled."""
  import jax
  import jax.numpy as jnp
  from qwix._src.core import qarray

  array = jnp.asarray(x)

  def noise(shape):
    return jax.random.uniform(jax.random.key(1), shape, minval=-0.5, maxval=0.5)

  cases: list[tuple[str, Any, dict[str, Any]]] = [
    ("float8", jnp.float8_e4m3fn, {}),
    ("int8", jnp.int8, {}),
    ("int8 affine", jnp.int8, {"calibration_method": "minmax"}),
    ("int4", jnp.int4, {}),
    ("int2", "int2", {}),
    ("int8 stochastic", jnp.int8, {"noise_fn": noise}),
    ("int4 stochastic", jnp.int4, {"noise_fn": noise}),
    ("nf4", "nf4", {"tiled_axes": {0: 64}}),
  ]
  for title, qtype, options in cases:
    how = qarray.HowToQuantize(qtype=qtype, **options)
    encode = jax.jit(lambda x, how=how: qarray.quantize(x, how))
    decode = jax.jit(qarray.dequantize)
    yield Task(
      title,
      lambda: jax.block_until_ready(encode(array)),
      lambda payload: jax.block_until_ready(decode(payload)),
      lambda payload: sum(leaf.nbytes for leaf in jax.tree.leaves(payload)),
    )


def torch(x: np.ndarray) -> Iterator[Task]:
  """torch: its own casts and quantised tensors, else its tensor operations."""
  import torch

  array = torch.from_numpy(x)

  def scale_of(largest):
    low, high = torch.aminmax(array)
    return float(torch.maximum(-low, high)) / largest

  def int8():
    return torch.quantize_per_tensor(array, scale_of(127), 0, torch.qint8)

  def affine():
    low, high = (float(part) for part in torch.aminmax(array))
    scale = (max(high, 0) - min(low, 0)) / 255
    zero = round(-128 - min(low, 0) / scale)
    return torch.quantize_per_tensor(array, scale, zero, torch.qint8)

  def codes(largest, stochastic):
    scale = scale_of(largest)
    y = array / scale
    y = y.add_(torch.rand_like(y)).floor_() if stochastic else y.round_()
    return scale, y.clamp_(-largest, largest).add_(largest).to(torch.uint8)

  def stochastic8():
    return codes(127, True)

  def pack4(stochastic):
    scale, code = codes(7, stochastic)
    half = code.numel() // 2
    return scale, code[:half] | (code[half:] << 4)

  def unpack4(payload):
    scale, packed = payload
    code = torch.cat([packed & 15, packed >> 4])
    return code.to(torch.float32).sub_(7).mul_(scale)

  def float8():
    scale = scale_of(448)
    return scale, (array / scale).to(torch.float8_e4m3fn)

  def scaled(payload, offset=0):
    return payload[1].to(torch.float32).sub_(offset).mul_(payload[0])

  def size(payload):
    array = payload[1] if isinstance(payload, tuple) else payload
    return array.numel() * array.element_size()

  yield Task("float16", lambda: array.half(), lambda p: p.float(), size)
  yield Task("bfloat16", lambda: array.bfloat16(), lambda p: p.float(), size)
  yield Task("float8", float8, scaled, size)
  yield Task("int8", int8, lambda p: p.dequantize(), size)
  yield Task("int8 affine", affine, lambda p: p.dequantize(), size)
  yield Task("int4", lambda: pack4(False), unpack4, size)
  yield Task("int8 stochastic", stochastic8, lambda p: scaled(p, 127), size)
  yield Task("int4 stochastic", lambda: pack4(True), unpack4, size)


SYSTEMS = {"mpqfl_jax": ours, "xla": xla, "qwix": qwix, "torch": torch}
# Both are this package.
OURS = ("mpqfl_jax", "xla")


def work(system: str, elements: int) -> list[Row]:
  """All rows of one system, in this process."""
  x = np.random.default_rng(0).standard_normal(elements).astype(np.float32)
  x *= np.float32(0.01)
  beside = copies(x)
  rows = []
  for codec, encode, decode, size, kernels in SYSTEMS[system](x):
    payload = encode()
    bytes_ = size(payload)
    error = np.asarray(decode(payload)).reshape(-1) - x
    snr = 10 * np.log10(np.mean(x**2) / np.mean(error**2))
    moved = (x.nbytes + bytes_) / 1e9
    encoding, decoding, *copying = best_seconds(
      encode, lambda: decode(payload), *beside
    )
    rows.append(
      {
        "system": system,
        "codec": codec,
        "kernels": kernels,
        "elements": elements,
        "encode_gb_s": moved / encoding,
        "decode_gb_s": moved / decoding,
        "memcpy_gb_s": 2 * x.nbytes / min(copying) / 1e9,
        "bits_per_element": 8 * bytes_ / elements,
        "snr_db": float(snr),
      }
    )
  return rows


def run(system: str, elements: int, peers_dir: pathlib.Path) -> list[Row]:
  """Rows of one system, in a process of its own."""
  python = sys.executable
  if system not in OURS:
    python = str(peers_dir / system / "bin" / "python")
    if not pathlib.Path(python).exists():
      raise SystemExit(f"no {python}: run `make bench-peers` first")
  command = [python, __file__, f"--worker={system}", f"--elements={elements}"]
  from mpqfl_jax import host

  environment = os.environ | host.variables(one_arena=True) | _WAITING
  done = subprocess.run(
    command, capture_output=True, text=True, env=environment
  )
  if done.returncode:
    raise SystemExit(f"{system} failed:\n{done.stderr}")
  if system in OURS:
    print(done.stderr, end="", file=sys.stderr)
  return json.loads(done.stdout.splitlines()[-1])


def merge(rows: list[Row]) -> list[Row]:
  """The middle of all rounds for each system and codec.

  `memcpy_gb_s` is the median of the rounds', and a rate the median share of the
  copy beside it times that. All shares are `encode_shares` and `decode_shares`,
  in the order of the rounds.
  """
  # Not at the top: a peer's environment has no part of this package.
  from mpqfl_jax import host

  found: dict[tuple[str, str], list[Row]] = {}
  for row in rows:
    found.setdefault((row["codec"], row["system"]), []).append(row)
  merged = []
  for turns in found.values():
    copy = statistics.median(turn["memcpy_gb_s"] for turn in turns)
    row = turns[0] | {"memcpy_gb_s": copy}
    for way in ("encode", "decode"):
      rate = f"{way}_gb_s"
      shares = [turn[rate] / turn["memcpy_gb_s"] for turn in turns]
      row |= {f"{way}_shares": shares, rate: copy * statistics.median(shares)}
    machine = {"cpu": host.processor(), "cores": os.cpu_count()}
    merged.append(row | machine)
  order = {codec: i for i, (codec, _) in enumerate(found)}
  return sorted(merged, key=lambda row: order[row["codec"]])


def print_table(rows: list[Row]) -> None:
  """Prints rates, and their share of the copy's."""
  print(
    f"{'codec':16} {'system':10} {'encode GB/s':>17} {'decode GB/s':>17}"
    f" {'copy':>6} {'bits':>6} {'SNR dB':>7}"
  )
  for row in rows:
    copy = row["memcpy_gb_s"]
    cells = [
      f"{row[rate]:9.2f} ({row[rate] / copy:4.0%})"
      for rate in ("encode_gb_s", "decode_gb_s")
    ]
    print(
      f"{row['codec']:16} {row['system']:10} {cells[0]:>17} {cells[1]:>17}"
      f" {copy:6.1f} {row['bits_per_element']:6.2f} {row['snr_db']:7.1f}"
    )


def beside(mine: dict[str, Row], way: str) -> str:
  """How many times as fast as the faster peer: the median round, the extremes.

  Args:
    mine: the rows of one codec, by system.
    way: `encode` or `decode`.
  """
  peers = [row for system, row in mine.items() if system not in OURS]
  if not peers:
    return "-"
  ours = mine["mpqfl_jax"][f"{way}_shares"]
  peer = max((row[f"{way}_shares"] for row in peers), key=statistics.median)
  ratios = [ours / theirs for ours, theirs in zip(ours, peer, strict=True)]
  low, high = min(ratios), max(ratios)
  return f"{statistics.median(ratios):.2f} ({low:.2f} to {high:.2f})"


def markdown(rows: list[Row]) -> str:
  """The table of `docs/quantization.md`: a line a codec, all systems in it."""
  systems = [s for s in SYSTEMS if any(row["system"] == s for row in rows)]
  names = " / ".join(["ours", *systems[1:]])
  heads = ["Codec", "Bits"]
  for way in ("Encode", "Decode"):
    heads += [f"{way}, GB/s", f"Share of a copy: {names}", "Beside a peer"]
  lines = ["| " + " | ".join(heads) + " |", "| :-- |" + " --: |" * 7]
  for codec in dict.fromkeys(row["codec"] for row in rows):
    mine = {row["system"]: row for row in rows if row["codec"] == codec}
    ours = mine.get("mpqfl_jax")
    if ours is None:
      continue
    cells = [codec, f"{ours['bits_per_element']:.2f}"]
    for way in ("encode", "decode"):
      rate = f"{way}_gb_s"
      shares = [
        f"{mine[s][rate] / mine[s]['memcpy_gb_s']:.0%}" if s in mine else "-"
        for s in systems
      ]
      cells += [f"{ours[rate]:.1f}", " / ".join(shares), beside(mine, way)]
    lines.append("| " + " | ".join(cells) + " |")
  copies = [row["memcpy_gb_s"] for row in rows]
  native = [row["codec"] for row in rows if row["kernels"] == "native"]
  by = f"Native passes: {', '.join(native)}. " if native else ""
  lines.append(
    f"\n{by}{rows[0]['elements']:,} elements on {rows[0]['cpu']},"
    f" {rows[0]['cores']} cores; copying float32 beside it reached"
    f" {min(copies):.0f} to {max(copies):.0f} GB/s."
  )
  return "\n".join(lines)


def main() -> None:
  """Runs the benchmark."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
  parser.add_argument("--elements", type=int, default=25_000_000)
  parser.add_argument("--peers", default="", help="of qwix, torch, xla")
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--json", default="", help="file to write")
  parser.add_argument(
    "--write", type=pathlib.Path, help="page whose table to replace"
  )
  parser.add_argument(
    "--peers_dir", type=pathlib.Path, default=pathlib.Path(".venv-peers")
  )
  parser.add_argument("--worker", choices=SYSTEMS, help=argparse.SUPPRESS)
  flags = parser.parse_args()
  if flags.worker:
    print(json.dumps(work(flags.worker, flags.elements)))
    return
  peers = [peer for peer in flags.peers.split(",") if peer]
  for peer in peers:
    if peer not in SYSTEMS:
      parser.error(f"unknown peer {peer!r}: expected qwix, torch or xla")
  rows = []
  for _ in range(flags.rounds):
    for system in ("mpqfl_jax", *peers):
      rows += run(system, flags.elements, flags.peers_dir)
  rows = merge(rows)
  print_table(rows)
  if flags.json:
    pathlib.Path(flags.json).write_text(json.dumps(rows, indent=2) + "\n")
  if flags.write:
    from benchmarks import page

    page.put(flags.write, "benchmarks.quantize", markdown(rows))


if __name__ == "__main__":
  main()
