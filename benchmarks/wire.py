"""What entropy coding saves of each codec's messages, and what it costs.

    python -m benchmarks.wire
    python -m benchmarks.wire --write=docs/wire.md

One client of an untrained model trains locally on embedded MNIST; each codec
encodes its update. `gain` is the length of the plain message over that of the
coded one. `entropy_bits` is the least that any coder of single codes, without
context, could reach for the codes of the largest leaf; `neighbours_bytes` is
what the same coder makes of that leaf's codes when neighbours, rather than
runs, share a byte. Times are CPU time of one thread, the best of several, per
message: packing and coding at the client, decoding and reading at the server,
and the same without coding.
"""

import argparse
from collections.abc import Callable, Sequence
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import page
from mpqfl_jax import (
  bitpack,
  datasets,
  entropy,
  local,
  models,
  precision,
  specs,
  trees,
)
from mpqfl_jax.types import Examples, Update

Row = dict[str, Any]

CODECS = (
  *("none", "float16", "bfloat16", "float8", "int8", "int8(mode=affine)"),
  *("int6", "int4", "int4(granularity=channel)", "int3", "int2", "ternary"),
  *("sign", "nf4", "qsgd", "drive", "prune", "topk", "randomk", "paper"),
  "mixed_random",
)
REPETITIONS = 5
# Number of codes of those that keep one of at most 8 bits an entry.
LEVELS = {f"int{bits}": 2**bits - 1 for bits in (2, 3, 4, 6, 8)}
LEVELS |= {"sign": 2, "ternary": 3, "nf4": 16, "qsgd": 15, "float8": 256}


def client_update(model: str, images: int = 64) -> Update:
  """The update of one client: an epoch of SGD in batches of 16, rate 0.05.

  Args:
    model: a name in `models.MODELS`; its weights are initial.
    images: how many of MNIST's embedded sample the client has.
  """
  data = datasets.load("mnist_sample")
  shape = (*data.x_train.shape[1:3], data.x_train.shape[3])
  net = models.make(model, shape, len(data.class_names), data.mean, data.std)
  schedule = local.Schedule(batch_size=16, max_examples=images)
  train = jax.jit(local.sgd(net, optax.sgd, schedule))
  examples = Examples(
    jnp.asarray(data.x_train[:images]),
    jnp.asarray(data.y_train[:images], jnp.int32),
    jnp.arange(images, dtype=jnp.int32),
  )
  params = net.init(jax.random.key(0))
  place = jnp.int32(0), jnp.int32(images)
  key, rate = jax.random.key(1), jnp.float32(0.05)
  return train(params, examples, *place, key, rate).update


def best_ms(fn: Callable[[], Any]) -> float:
  """Least CPU time of several calls, milliseconds."""
  times = []
  for _ in range(REPETITIONS):
    began = time.thread_time()
    fn()
    times.append(time.thread_time() - began)
  return 1000 * min(times)


def measure(model: str, update: Update, spec: str, coding: str) -> Row:
  """One codec on one update, with and without entropy coding."""
  name, options = specs.parse(spec)
  plain = precision.make(name, update, **options)
  coded = precision.make(name, update, **options, entropy=coding)
  payload, _ = jax.jit(plain.encode)(
    jax.random.key(2), update, plain.init(update)
  )
  payload = jax.device_get(payload)
  message, short = plain.pack(payload), coded.pack(payload)
  plain.unpack(message)  # some readers compile a mask once
  return {
    "model": model,
    "codec": spec,
    "entropy": coding,
    "parameters": trees.size(update),
    "plain_bytes": len(message),
    "coded_bytes": len(short),
    "gain": len(message) / len(short),
    **of_largest_leaf(name, options, update, coding),
    "pack_ms": best_ms(lambda: plain.pack(payload)),
    "pack_and_code_ms": best_ms(lambda: coded.pack(payload)),
    "read_ms": best_ms(lambda: plain.unpack(message)),
    "decode_and_read_ms": best_ms(lambda: coded.unpack(short)),
  }


def of_largest_leaf(
  name: str, options: dict[str, Any], update: Update, coding: str
) -> Row:
  """What the layout of codes in bytes does to entropy coding.

  Returns:
    Number of `codes`; `packed_bits` and `entropy_bits` of each; bytes of the
    packed codes as runs (`runs_bytes`) and as neighbours (`neighbours_bytes`)
    after coding. Empty for codecs that do not keep one code of at most 8 bits
    an entry.
  """
  levels = LEVELS.get(name)
  if levels is None:
    return {}
  levels += options.get("mode") == "affine"
  largest = max(jax.tree.leaves(update), key=lambda leaf: leaf.size)
  leaf = precision.leaf_codec(name, largest.shape, options)
  seed = jnp.array([1, 2], jnp.uint32)
  payload, _ = jax.jit(lambda x: leaf.encode(seed, x, leaf.init()))(largest)
  packed = np.asarray(payload["codes"])
  codes = bitpack.unpack(packed, largest.size, levels, np)
  share = np.bincount(codes, minlength=levels) / codes.size
  used = share[share > 0]
  made = entropy.make(coding)
  assert made is not None  # a coding is what this file is about
  return {
    "codes": codes.size,
    "packed_bits": 8 * packed.nbytes / codes.size,
    "entropy_bits": float(-(used * np.log2(used)).sum()) + 0.0,
    "runs_bytes": len(made.shrink(packed.tobytes())),
    "neighbours_bytes": len(made.shrink(neighbours(codes, levels))),
  }


def neighbours(codes: np.ndarray, levels: int) -> bytes:
  """Codes packed as most formats do: those next to each other share bytes."""
  if levels == 3:
    codes = np.pad(codes, (0, -codes.size % bitpack.TRITS))
    weights = 3 ** np.arange(bitpack.TRITS)
    return (codes.reshape(-1, bitpack.TRITS) @ weights).astype("u1").tobytes()
  width = bitpack.width_of(levels)
  bits = (codes[:, None] >> np.arange(width)) & 1
  return np.packbits(bits.astype(bool), bitorder="little").tobytes()


def markdown(rows: Sequence[Row]) -> str:
  """The table of `docs/wire.md`: a line a codec, all models side by side."""
  names = list(dict.fromkeys(row["model"] for row in rows))
  last = names[-1]
  of = {(row["model"], row["codec"]): row for row in rows}
  size = {row["model"]: row["parameters"] for row in rows}
  head = ["codec"]
  for name in names:
    head.append(f"`{name}`, {size[name]:,} parameters: bytes / coded / gain")
  head += [
    "bits a code: width / entropy / coded / coded, were neighbours packed"
  ]
  head += ["client, ms: pack / and code"]
  head += ["server, ms: read / decode and read"]
  lines = [head, ["---"] * len(head)]
  for codec in dict.fromkeys(row["codec"] for row in rows):
    cells = [f"`{codec}`"]
    for name in names:
      row = of[name, codec]
      cells.append(
        f"{row['plain_bytes']:,} / {row['coded_bytes']:,} / {row['gain']:.2f}"
      )
    row = of[last, codec]
    cells.append(_bits(row))
    for pair in (
      ("pack_ms", "pack_and_code_ms"),
      ("read_ms", "decode_and_read_ms"),
    ):
      cells.append(" / ".join(f"{row[key]:.1f}" for key in pair))
    lines.append(cells)
  return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def _bits(row: Row) -> str:
  if "entropy_bits" not in row:
    return ""
  codes = row["codes"]
  width = row["packed_bits"]
  coded = 8 * row["runs_bytes"] / codes
  beside = 8 * row["neighbours_bytes"] / codes
  return f"{width:.2f} / {row['entropy_bits']:.2f} / {coded:.2f} / {beside:.2f}"


def main() -> None:
  """Runs the benchmark."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
  parser.add_argument("--models", default="lenet_zhu,cnn")
  parser.add_argument("--codecs", default=",".join(CODECS))
  parser.add_argument("--entropy", default="zstd", help="or zstd(level=9)")
  parser.add_argument("--json", default="", help="file to write")
  parser.add_argument(
    "--write", type=pathlib.Path, help="page whose table to replace"
  )
  flags = parser.parse_args()
  rows = []
  for model in specs.split(flags.models):
    update = client_update(model)
    for spec in specs.split(flags.codecs):
      rows.append(measure(model, update, spec, flags.entropy))
  table = markdown(rows)
  print(table)
  if flags.json:
    pathlib.Path(flags.json).write_text(json.dumps(rows, indent=2) + "\n")
  if flags.write:
    page.put(flags.write, "benchmarks.wire", table)


if __name__ == "__main__":
  main()
