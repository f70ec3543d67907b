"""What homomorphic encryption costs as clients grow.

    python -m benchmarks.encryption --clients=2,5,10,20,50,100,200 \\
      --json=results/encryption/costs.json --plot=results/encryption/costs.png

    python -m benchmarks.encryption --clients=10,100,200 \\
      --schemes=shared,shared_16bit,shared_8bit,shared_4bit,shared_2bit \\
      --json=results/encryption/packed.json

For each scheme and number of clients: making and handing out keys, encrypting
an update, adding all of them, opening the sum, bytes on the wire, and how far
the mean is from the plaintext's. Schemes are those of `he(keys=...)`; threshold
is left out, with a line that says so, where OpenFHE does not load. Those in
bits are `he(bits=...,bound=0.04)`: whole numbers, rounded at random, several a
slot.

Times are CPU seconds of one thread, the least of several repetitions, so that a
busy machine does not show in them; nothing is said of the network, whose part
is the bytes and the number of messages that have to wait for one another
(`key_steps`). Updates are synthetic: independent normal entries of deviation
0.01, with weights between 0.1 and 1. Rows beyond `--clients` are not measured
but modelled, and labelled so: times and bytes are straight lines in the number
of clients, fitted to the measured ones; the error follows the scale that is
left by `ckks.parameters`. Whole numbers are not modelled.
"""

import argparse
from collections.abc import Callable, Sequence
import json
import os
import pathlib
import time
from typing import Any, NamedTuple

# One thread: set before a library that reads it is loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import jax
from matplotlib import figure as mpl_figure
import numpy as np

from mpqfl_jax import bfv, ckks, errors, he, models, threshold, trees
from mpqfl_jax.report import style

Row = dict[str, Any]
SEAL_BYTES = 48  # X25519 and Poly1305, as in `encrypted`
MODELLED = (500, 1000, 2000, 5000, 10_000)
# Grow with the clients along a straight line; the rest stays as it is.
LINEAR = ("key_seconds_total", "key_seconds_path", "key_bytes", "add_seconds")
LINEAR_THRESHOLD = (*LINEAR, "decrypt_seconds", "share_bytes_total")


class Scheme(NamedTuple):
  """One way to keep keys.

  Attributes:
    parameters: number of clients -> parameters.
    keys: (parameters, clients) -> keys of all clients.
    key_bytes: keys -> what crosses the wire to hand them out.
    key_steps: clients -> messages one after another until all have their keys.
    when: how often keys are made.
    encrypt: (keys, update, weight, generator) -> message.
    add: (keys, messages) -> message.
    shares: (keys, message) -> what is needed from each client to open it.
    open: (keys, message, shares, clients) -> he.Sum.
  """

  parameters: Callable
  keys: Callable
  key_bytes: Callable
  key_steps: Callable[[int], int]
  when: str
  encrypt: Callable
  add: Callable
  shares: Callable
  open: Callable


def _pairs_bytes(pairs: Sequence[he.SecretKey]) -> int:
  # Each sends its own up; the cohort fetches the key holder's.
  return (2 * len(pairs) - 1) * len(pairs[0].public.serialized)


def _shared_bytes(pairs: Sequence[he.SecretKey], clients: int) -> int:
  size = len(pairs[0].serialized) + len(pairs[0].public.serialized)
  return (clients - 1) * (size + SEAL_BYTES)


def _single(
  keys: Callable,
  key_bytes: Callable,
  when: str,
  parameters: Callable = ckks.parameters,
) -> Scheme:
  return Scheme(
    parameters=parameters,
    keys=keys,
    key_bytes=key_bytes,
    key_steps=lambda clients: 1,
    when=when,
    encrypt=lambda keys, *given: he.encrypt(keys[0].public, *given),
    add=lambda keys, messages: he.add(keys[0].public, messages),
    shares=lambda keys, message: {},
    open=lambda keys, message, shares, n: he.decrypt(keys[0], message, n),
  )


def _shared(parameters: Callable) -> Scheme:
  return _single(
    lambda params, clients: [he.key_pair(params)],
    _shared_bytes,
    "once",
    parameters,
  )


# Four deviations of the synthetic updates: 6 entries of 100,000 are cut off.
_BOUND = 0.04
SCHEMES: dict[str, Scheme] = {
  "shared": _shared(ckks.parameters),
  "per_client": _single(
    lambda params, clients: [he.key_pair(params) for _ in range(clients)],
    lambda keys, clients: _pairs_bytes(keys),
    "once a client",
  ),
  "threshold": Scheme(
    parameters=threshold.parameters,
    keys=lambda params, clients: threshold.generate(params, range(clients)),
    key_bytes=lambda group, clients: group.wire_bytes,
    key_steps=lambda clients: clients,
    when="every round",
    encrypt=lambda group, u, w, rng: threshold.encrypt(group, u, w),
    add=threshold.add,
    shares=lambda group, message: {
      c: threshold.share(group, c, message) for c in group.members
    },
    open=threshold.open_shares,
  ),
  **{
    f"shared_{bits}bit": _shared(
      lambda clients, bits=bits: bfv.parameters(clients, bits, _BOUND)
    )
    for bits in (16, 8, 4, 2)
  },
}


def _least(fn: Callable[[], Any], repetitions: int) -> tuple[Any, float]:
  """What `fn` gives, and the least CPU seconds that it took."""
  seconds, value = [], None
  for _ in range(repetitions):
    began = time.process_time()
    value = fn()
    seconds.append(time.process_time() - began)
  return value, min(seconds)


def measure(name: str, clients: int, values: int, repetitions: int) -> Row:
  """One row: a scheme with so many clients and updates of so many values.

  Raises:
    UserError: the scheme does not load, or not with so many clients.
  """
  scheme = SCHEMES[name]
  params = scheme.parameters(clients)
  rng = np.random.default_rng(0)
  updates = rng.normal(0, 0.01, (clients, values))
  weights = rng.uniform(0.1, 1, clients)
  keys, key_seconds = _least(lambda: scheme.keys(params, clients), repetitions)
  messages, encrypt_seconds = _least(
    lambda: [
      scheme.encrypt(keys, u, float(w), rng)
      for u, w in zip(updates, weights, strict=True)
    ],
    repetitions,
  )
  total, add_seconds = _least(lambda: scheme.add(keys, messages), repetitions)
  shares, share_seconds = _least(
    lambda: scheme.shares(keys, total), repetitions
  )
  opened, decrypt_seconds = _least(
    lambda: scheme.open(keys, total, shares, clients), repetitions
  )
  exact = np.average(updates, axis=0, weights=weights)
  upload = float(np.mean([len(m) for m in messages]))
  # One after another where each step needs the last, else side by side.
  path = (
    key_seconds
    if scheme.key_steps(clients) > 1 or name != "per_client"
    else (key_seconds / clients)
  )
  return {
    "scheme": name,
    "source": "measured",
    "clients": clients,
    "values": values,
    "degree": params.modulus.degree,
    "modulus_bits": params.modulus.bits + params.modulus.special_bits,
    "scale_bits": getattr(params, "scale_bits", None),
    "keys_made": scheme.when,
    "key_steps": scheme.key_steps(clients),
    "key_seconds_total": key_seconds,
    "key_seconds_path": path,
    "key_bytes": scheme.key_bytes(keys, clients),
    "encrypt_seconds": encrypt_seconds / clients,
    "upload_bytes": upload,
    "expansion": upload / (4 * values),
    "add_seconds": add_seconds,
    "share_seconds": share_seconds / clients,
    "share_bytes_total": sum(map(len, shares.values())),
    "decrypt_seconds": decrypt_seconds,
    "relative_error": float(
      np.linalg.norm(opened.mean - exact) / np.linalg.norm(exact)
    ),
  }


def model(rows: Sequence[Row], clients: int) -> Row:
  """A row that nobody measured, from those of one scheme that were.

  Raises:
    UserError: the scheme has no parameters for so many clients.
  """
  last = rows[-1]
  scheme = SCHEMES[last["scheme"]]
  params = scheme.parameters(clients)
  x = np.array([row["clients"] for row in rows], float)
  row = {**last, "source": "modelled", "clients": clients}
  names = LINEAR_THRESHOLD if last["scheme"] == "threshold" else LINEAR
  for name in names:
    y = np.array([r[name] for r in rows], float)
    # Relative errors count, or the largest would decide alone.
    slope, start = np.polyfit(x, y, 1, w=1 / np.maximum(y, 1e-12))
    row[name] = float(start + slope * clients)
  if last["scheme"] == "shared":
    for name in ("key_seconds_total", "key_seconds_path"):
      row[name] = float(np.median([r[name] for r in rows]))
  if last["scheme"] == "per_client":
    row["key_seconds_path"] = row["key_seconds_total"] / clients
  lost = last["scale_bits"] - params.scale_bits
  row["scale_bits"] = params.scale_bits
  row["key_steps"] = scheme.key_steps(clients)
  # Noise and sum of independent updates both grow with the root of clients; a
  # share's noise goes on top of each ciphertext's in the same way.
  row["relative_error"] = last["relative_error"] * 2.0**lost
  return row


def draw(rows: Sequence[Row]) -> mpl_figure.Figure:
  """Costs against clients; dashed and hollow where modelled."""
  panels = (
    ("key_seconds_total", "Making keys, all clients, CPU s"),
    ("key_steps", "Key messages one after another"),
    ("key_bytes", "Keys on the wire, bytes"),
    ("add_seconds", "Adding at the server, CPU s"),
    ("decrypt_seconds", "Opening the sum, CPU s"),
    ("relative_error", "Relative error of the mean"),
  )
  schemes = list(dict.fromkeys(row["scheme"] for row in rows))
  looks = style.styles(schemes)
  fig = style.new_figure(10.0, 6.0)
  for ax, (name, title) in zip(fig.subplots(2, 3).flat, panels, strict=True):
    for scheme in schemes:
      mine = [row for row in rows if row["scheme"] == scheme]
      measured = [row for row in mine if row["source"] == "measured"]
      for part, line, face in (
        (measured, "-", looks[scheme].color),
        (mine[len(measured) - 1 :], "--", "white"),
      ):
        ax.plot(
          [row["clients"] for row in part],
          [row[name] for row in part],
          line,
          color=looks[scheme].color,
          marker=looks[scheme].marker,
          markerfacecolor=face,
          markersize=5,
          linewidth=1.3,
          zorder=3 if line == "-" else 2,
          label=scheme if line == "-" else None,
        )
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_title(title, fontsize=10, color=style.INK, loc="left")
    ax.set_xlabel("Clients (log)", fontsize=9)
    style.clean(ax)
  fig.axes[0].legend(frameon=False, fontsize=8.5)
  fig.supxlabel(
    "Filled: measured. Hollow, dashed: modelled.", fontsize=9, color=style.MUTED
  )
  return fig


def print_table(rows: Sequence[Row]) -> None:
  """Prints the rows as Markdown."""
  heads = (
    "keys",
    "clients",
    "key generation, CPU s: all",
    "in sequence",
    "key bytes",
    "encrypt, ms",
    "upload, bytes",
    "expansion",
    "add, ms",
    "share, ms",
    "open, ms",
    "relative error",
  )
  print(f"| {' | '.join(heads)} |")
  print(f"| :-- {'| --: ' * (len(heads) - 1)}|")
  for r in rows:
    cells = (
      r["scheme"],
      f"{r['clients']:,}"
      + ("" if r["source"] == "measured" else " (modelled)"),
      f"{r['key_seconds_total']:.3g}",
      f"{r['key_seconds_path']:.3g}",
      f"{r['key_bytes']:,.0f}",
      f"{1e3 * r['encrypt_seconds']:.1f}",
      f"{r['upload_bytes']:,.0f}",
      f"{r['expansion']:.2f}",
      f"{1e3 * r['add_seconds']:.1f}",
      f"{1e3 * r['share_seconds']:.1f}",
      f"{1e3 * r['decrypt_seconds']:.1f}",
      f"{r['relative_error']:.1e}",
    )
    print(f"| {' | '.join(cells)} |")


def main() -> None:
  """Runs the benchmark."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
  parser.add_argument("--clients", default="2,5,10,20,50,100,200")
  parser.add_argument("--schemes", default="shared,per_client,threshold")
  parser.add_argument("--model", default="lenet_zhu", help="gives the length")
  parser.add_argument("--repetitions", type=int, default=3)
  parser.add_argument("--json", type=pathlib.Path, help="file to write")
  parser.add_argument("--plot", type=pathlib.Path, help="PNG to write")
  flags = parser.parse_args()
  try:
    rows = run(flags)
  except errors.UserError as e:
    parser.error(str(e))
  print_table(rows)
  for path in (flags.json, flags.plot):
    if path is not None:
      path.parent.mkdir(parents=True, exist_ok=True)
  if flags.json is not None:
    flags.json.write_text(json.dumps(rows, indent=1) + "\n")
  if flags.plot is not None:
    draw(rows).savefig(flags.plot)


def run(flags: argparse.Namespace) -> list[Row]:
  """All rows that the flags ask for, the modelled ones after the measured."""
  clients = sorted({int(part) for part in flags.clients.split(",")})
  shape = (28, 28, 1)
  net = models.make(flags.model, shape, 10, np.zeros(1), np.ones(1), "xla")
  values = trees.size(jax.eval_shape(net.init, jax.random.key(0)))
  rows = []
  for name in flags.schemes.split(","):
    if name not in SCHEMES:
      raise errors.unknown_name("scheme", name, SCHEMES)
    mine = []
    try:
      for count in clients:
        mine.append(measure(name, count, values, flags.repetitions))
        print(f"{name}, {count} clients", flush=True)
    except errors.UserError as e:
      print(f"{name} left out from {count} clients on: {e}")
    if len(mine) > 1 and mine[0]["scale_bits"] is not None:
      for count in MODELLED:
        try:
          mine.append(
            model([r for r in mine if r["source"] == "measured"], count)
          )
        except errors.UserError as e:
          print(f"{name} not modelled from {count} clients on: {e}")
          break
    rows += mine
  return rows


if __name__ == "__main__":
  main()
