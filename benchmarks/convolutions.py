"""A convolution and its two gradients in each form, on one core.

    python -m benchmarks.convolutions --page=docs/performance.md

Forms take turns, and the shortest of a form's times counts. What they compute
is compared with the definition in NumPy's float64: the distance of output and
gradients from it, as a share of their length, the largest of the three.
"""

import argparse
from collections.abc import Sequence
import itertools
import json
import os
import pathlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import page
from mpqfl_jax import errors, exact, host, layers
from mpqfl_jax.report import tables

Row = dict[str, Any]


class Case(NamedTuple):
  """A convolution of stride 1 whose output is as large as its input.

  Attributes:
    of: models that have it.
    size: height and width.
    channels: in and out.
    kernel: height and width.
  """

  of: str
  size: int
  channels: tuple[int, int]
  kernel: int

  @property
  def name(self) -> str:
    """Its shape in words."""
    cin, cout = self.channels
    shape, taps = f"{self.size}x{self.size}", f"{self.kernel}x{self.kernel}"
    return f"{shape}, {cin} to {cout}, {taps} ({self.of})"


CASES = (
  Case("`cnn`", 14, (32, 64), 5),
  Case("`convnet`", 32, (64, 128), 3),
  Case("`convnet`, `resnet18`", 16, (128, 128), 3),
  Case("`resnet18`", 4, (512, 512), 3),
  Case("`resnet20`", 16, (32, 32), 3),
  Case("`resnet20`", 8, (64, 64), 3),
)


def exactly(
  x: np.ndarray,
  w: np.ndarray,
  d: np.ndarray,
  pads: Sequence[tuple[int, int]],
) -> list[np.ndarray]:
  """A convolution and its two gradients by the definition, in float64.

  Args:
    x: [batch, height, width, in].
    w: [height, width, in, out].
    d: [batch, height, width, out], the gradient to the output.
    pads: (before, after) of height and width.

  Returns:
    The output and the gradients to x and w.
  """
  x, w, d = (np.asarray(a, np.float64) for a in (x, w, d))
  padded = np.pad(x, ((0, 0), *pads, (0, 0)))
  height, width = d.shape[1:3]
  y, gx, gw = np.zeros_like(d), np.zeros_like(padded), np.zeros_like(w)
  for i, j in itertools.product(*map(range, w.shape[:2])):
    cut = np.s_[:, i : i + height, j : j + width]
    y += padded[cut] @ w[i, j]
    gx[cut] += d @ w[i, j].T
    gw[i, j] = np.tensordot(padded[cut], d, ((0, 1, 2), (0, 1, 2)))
  (top, _), (left, _) = pads
  return [y, gx[:, top : top + x.shape[1], left : left + x.shape[2]], gw]


def measure(
  case: Case, batch: int, forms: list[str], repeats: int
) -> list[Row]:
  """A row a form.

  Raises:
    UserError: no such form.
  """
  rng = np.random.default_rng(0)
  square = (batch, case.size, case.size)
  shapes = (
    (*square, case.channels[0]),
    (case.kernel, case.kernel, *case.channels),
    (*square, case.channels[1]),
  )
  x, w, d = (rng.standard_normal(shape, np.float32) for shape in shapes)
  low = (case.kernel - 1) // 2
  want = exactly(x, w, d, [(low, case.kernel - 1 - low)] * 2)
  arrays = [jnp.asarray(a) for a in (x, w, d)]
  programs, rows = [], []
  for form in forms:
    convolve = layers.convolution(form)

    def both(x, w, d, convolve=convolve):
      y, back = jax.vjp(
        lambda x, w: convolve(
          x, w, (1, 1), "SAME", dimension_numbers=layers.NHWC
        ),
        x,
        w,
      )
      return y, *back(d)

    program = jax.jit(both).lower(*arrays).compile()
    off = [
      np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)
      for a, b in zip(program(*arrays), want, strict=True)
    ]
    programs.append(program)
    rows.append(
      case._asdict() | {"batch": batch, "form": form, "off": float(max(off))}
    )
  taken: list[list[float]] = [[] for _ in forms]
  for _ in range(repeats):
    for program, seconds in zip(programs, taken, strict=True):
      began = time.perf_counter()
      jax.block_until_ready(program(*arrays))
      seconds.append(time.perf_counter() - began)
  for row, seconds in zip(rows, taken, strict=True):
    row["seconds"] = min(seconds)
  return rows


def markdown(rows: list[Row]) -> str:
  """A line a convolution: milliseconds and distance in each form."""
  forms = list(dict.fromkeys(row["form"] for row in rows))
  first = forms[0]
  head = ["A convolution and its gradients", *(f"`{f}`, ms" for f in forms)]
  head += [f"`{f}` to `{first}`" for f in forms[1:]]
  head += [f"`{f}` off float64" for f in forms]
  table = [head, [":--", *["--:"] * (len(head) - 1)]]
  for case, group in itertools.groupby(
    rows, lambda row: Case(*(row[field] for field in Case._fields))
  ):
    found = list(group)
    cells = [f"{1e3 * row['seconds']:.3g}" for row in found]
    cells += [
      f"{found[0]['seconds'] / row['seconds']:.1f} times" for row in found[1:]
    ]
    cells += [f"{row['off']:.0e}" for row in found]
    table.append([case.name, *cells])
  return tables.joined(table)


def main() -> None:
  """Measures every case, prints the table and puts it into a page."""
  flags = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  flags.add_argument("--forms", default="canonical,winograd")
  flags.add_argument("--batch", type=int, default=16)
  flags.add_argument("--repeats", type=int, default=20)
  flags.add_argument("--json", help="Also write the rows to this file.")
  flags.add_argument("--page", help="Put the table into this page.")
  args = flags.parse_args()
  rows: list[Row] = []
  try:
    for case in CASES:
      rows += measure(case, args.batch, args.forms.split(","), args.repeats)
  except errors.UserError as error:
    flags.error(str(error))
  table = markdown(rows)
  print(table)
  if args.json:
    pathlib.Path(args.json).write_text(json.dumps(rows, indent=2) + "\n")
  if args.page:
    where = f"Batches of {args.batch}, one core of {host.processor()}."
    page.put(pathlib.Path(args.page), "convolutions", f"{table}\n\n{where}")


if __name__ == "__main__":
  host.restart()
  # Before JAX counts them.
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
  with exact.products():
    main()
