"""Markdown of `benchmarks.federated --json`, for docs/performance.md.

    python -m benchmarks.federated_table --page=docs/performance.md \
      results/federated/*.json

A table for each model: a group of rows is one run, in which the systems took
turns. The ratio is ours over the fastest peer of that run.
"""

import argparse
import json
import pathlib
from typing import Any

from benchmarks import page

Row = dict[str, Any]
OURS = "mpqfl_jax"


def ratio(rows: list[Row]) -> float | None:
  """Our best updates a second over the best peer's, of one run."""

  def best(ours: bool) -> float:
    return max(
      (
        row["client_updates_per_second"]
        for row in rows
        if (row["system"] == OURS) is ours
      ),
      default=0.0,
    )

  return best(True) / best(False) if best(False) else None


def markdown(runs: list[list[Row]]) -> str:
  """The tables.

  Args:
    runs: what each file holds.
  """
  lines: list[str] = []
  by_size = sorted(runs, key=lambda rows: rows[0]["clients"])
  for model in sorted({rows[0]["model"] for rows in runs}, reverse=True):
    lines += [
      f"`{model}`",
      "",
      "| clients | system | plan | updates/s | GFLOP/s | of the product |"
      " memory, MB | first round, s |",
      "| --: | :-- | :-- | --: | --: | --: | --: | --: |",
    ]
    for rows in by_size:
      if rows[0]["model"] != model:
        continue
      times = ratio(rows)
      for row in sorted(rows, key=lambda row: row["seconds_per_round"]):
        share = row["gflops"] / row["matmul_peak_gflops"]
        rate = f"{row['client_updates_per_second']:.1f}"
        if row["system"] == OURS:
          rate = f"**{rate}**"
        lines.append(
          f"| {row['clients']} | {row['system']} | {row['plan']} | {rate} |"
          f" {row['gflops']:.0f} | {share:.0%} | {row['peak_rss_mb']:.0f} |"
          f" {row['first_round_seconds']:.1f} |"
        )
      if times is not None:
        lines.append(
          f"| {rows[0]['clients']} | _ours over the best peer_ | |"
          f" {times:.2f} times | | | | |"
        )
    lines.append("")
  first = runs[0][0]
  peaks = [rows[0]["matmul_peak_gflops"] for rows in runs]
  lines.append(
    f"{first['cpu']}, {first['cores']} cores; float32 matrix product"
    f" {min(peaks):.0f} to {max(peaks):.0f} GFLOP/s."
  )
  return "\n".join(lines)


def main() -> None:
  """Prints the tables, or puts them into a page."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
  parser.add_argument("files", nargs="+", type=pathlib.Path)
  parser.add_argument("--page", type=pathlib.Path, help="page to put them into")
  args = parser.parse_args()
  text = markdown([json.loads(f.read_text()) for f in args.files])
  print(text)
  if args.page:
    page.put(args.page, "federated", text)


if __name__ == "__main__":
  main()
