"""The page of a `leakage` run: what an attacker is predicted to rebuild."""

from collections.abc import Iterator
import pathlib
from typing import Any

import numpy as np

from mpqfl_jax import errors, metrics
from mpqfl_jax.report import figures, page, records, style, tables

_HEADINGS = (
  "Defence",
  "Uplink, bytes",
  "vs float32",
  "Predicted PSNR, dB (median)",
  "of all images",
)


def _rows(found: dict[str, Any]) -> Iterator[list[str]]:
  for spec, entry in found["defenses"].items():
    size = entry["uplink_bytes_per_client"]
    low, high = (entry[f"psnr_db_predicted_{e}"] for e in ("min", "max"))
    yield [
      spec,
      f"{size:,.0f}",
      tables.ratio(size, found["uplink_bytes_per_client_float32"]),
      f"{entry['psnr_db_predicted_median']:.1f}",
      f"{low:.1f} to {high:.1f}",
    ]


def _references(found: dict[str, Any]) -> Iterator[list[str]]:
  for name, label in tables.REFERENCE_NAMES.items():
    value = found["references"][name]["psnr_db_median"]
    yield [label, "", "", f"{value:.1f}", ""]


def _policy(found: dict[str, Any]) -> str | None:
  policy = found.get("policy")
  if not policy:
    return None
  return (
    f"The policy in {policy['path']}: {policy['num_bytes']:,} bytes,"
    f" {100 * policy['relative_error']:.1f}% squared error, predicted"
    f" {policy['psnr_db_predicted']:.1f} dB on training images. Use it with"
    f" --defense={policy['path']}."
  )


def markdown(found: dict[str, Any]) -> str:
  """The table in GitHub's dialect, and where the policy is that was searched.

  Args:
    found: `summary.json` of a `leakage` run.
  """
  rule = [":--", *["--:"] * 4]
  references = [[f"_{row[0]}_", *row[1:]] for row in _references(found)]
  text = tables.joined([list(_HEADINGS), rule, *_rows(found), *references])
  policy = _policy(found)
  return text if policy is None else f"{text}\n{policy}\n"


def sentences(found: dict[str, Any]) -> Iterator[str]:
  """Which defences are predicted to show an image, and how far from a guess."""
  medians = {
    spec: entry["psnr_db_predicted_median"]
    for spec, entry in found["defenses"].items()
  }
  shown = [s for s, value in medians.items() if value >= metrics.SUCCESS_DB]
  yield (
    "An attacker who knows the codec is predicted to rebuild half of the images"
    f" to {metrics.SUCCESS_DB:.0f} dB or better under {len(shown)} of"
    f" {len(medians)} defences" + (f": {', '.join(shown)}." if shown else ".")
  )
  least = min(medians, key=lambda s: medians[s])
  guess = max(
    (r["psnr_db_median"], tables.REFERENCE_NAMES[name])
    for name, r in found["references"].items()
    if name in tables.REFERENCE_NAMES
  )
  yield (
    f"The least is {medians[least]:.1f} dB, under {least}; the best guess"
    f" without an update ({guess[1]}) has {guess[0]:.1f} dB."
  )
  policy = _policy(found)
  if policy:
    yield policy


def _draw(
  images: dict[str, list[float]], found: dict[str, Any], path: pathlib.Path
) -> figures.Figure:
  """A mark an image, a row a defence."""
  looks = style.styles(images)
  fig = style.new_figure(8, 1.4 + 0.36 * len(images))
  ax = fig.subplots()
  highest = max(map(max, images.values()))
  figures.strips(ax, list(images), images, looks, highest)
  figures.references(ax, found, above=True)
  ax.set_xlabel("Predicted PSNR, dB", fontsize=10, color=style.INK)
  fig.savefig(path)
  said = "; ".join(
    f"{spec}: median {np.median(values):.1f} dB"
    for spec, values in images.items()
  )
  return figures.Figure(
    path,
    "Predicted leakage",
    f"Dot plot of predicted PSNR, a dot an image. {said}.",
    "A mark is an image, the bar the median. Right of the 20 dB line the"
    " private image is there to see.",
    800,
  )


def write(run_dir: str | pathlib.Path) -> pathlib.Path:
  """Draws the figure of a `leakage` run and writes its page.

  Args:
    run_dir: the folder of a finished run.

  Returns:
    Path of `report.html`; the figure is in `figures/leakage.png` and embedded.

  Raises:
    UserError: the folder holds no finished `leakage` run.
  """
  folder, found, config = records.finished(run_dir, "leakage")
  images: dict[str, list[float]] = {}
  for line in records.lines(folder / "leakage.jsonl"):
    images.setdefault(line["defense"], []).append(line["psnr_db_predicted"])
  if images.keys() != found["defenses"].keys():
    raise errors.UserError(
      f"{folder / 'leakage.jsonl'} is not of the run in summary.json; expected"
      f" lines of {', '.join(found['defenses'])}."
    )
  path = folder / "figures" / "leakage.png"
  return page.write_table(
    folder,
    config,
    title="What an attacker is predicted to rebuild",
    sentences=list(sentences(found)),
    figure=_draw(images, found, path),
    headings=_HEADINGS,
    rows=list(_rows(found)),
    references=list(_references(found)),
    note=(
      "A linearised posterior of single images, under an attacker who knows the"
      " codec: a ranking of policies and a first figure, not a bound. The last"
      " rows are guesses that use no update."
    ),
  )
