"""The main table of a run, as rows of text and as Markdown."""

from collections.abc import Iterable, Iterator, Sequence
import json
from typing import Any, NamedTuple

from mpqfl_jax.report import records

MISSING = "\N{EN DASH}"
TIMES = "\N{MULTIPLICATION SIGN}"
MINUS = "\N{MINUS SIGN}"
EQUAL = "same"
REFERENCE_NAMES = {
  "mean_image": "mean training image",
  "grey": "grey (0.5)",
  "best_constant": "best constant colour",
  "noise": "uniform noise",
}


class Row(NamedTuple):
  """One defence, every value as the text that all tables print."""

  defense: str
  accuracy: str
  difference: str
  uplink: str
  ratio: str
  epsilon: str
  attack: str
  psnr: str
  psnr_max: str
  ssim: str
  success: str


HEADINGS = Row(
  defense="Defence",
  accuracy="Test accuracy, %",
  difference="vs none, points",
  uplink="Uplink, bytes per client and round",
  ratio="vs float32",
  epsilon="ε",
  attack="Strongest attack",
  psnr="PSNR, dB (median)",
  psnr_max="PSNR, dB (best)",
  ssim="SSIM (median)",
  success="≥ 20 dB, %",
)


def rows(summary: dict[str, Any]) -> list[Row]:
  """One row a defence, in the order of the summary.

  Args:
    summary: `summary.json`.
  """
  defenses = summary["defenses"]
  baseline = (defenses.get("none") or {}).get("test_accuracy")
  float32 = summary.get("uplink_bytes_per_client_float32")
  out = []
  for name, entry in defenses.items():
    accuracy = entry.get("test_accuracy")
    uplink = entry.get("uplink_bytes_per_client")
    cell = records.strongest(entry)
    # Without an attack the row still prints, with nothing to say of it.
    shown = cell or records.Cell(MISSING, "", None, None, None, None)
    out.append(
      Row(
        defense=name,
        accuracy=percent(accuracy),
        difference=_difference(name, accuracy, baseline),
        uplink=MISSING if uplink is None else f"{uplink:,.0f}",
        ratio=ratio(uplink, float32),
        epsilon=epsilon(entry),
        attack=attack_name(shown.attack, shown.regime)
        if cell
        else records.reason(entry) or MISSING,
        psnr=fixed(shown.psnr_db_median, 1),
        psnr_max=fixed(shown.psnr_db_max, 1),
        ssim=fixed(shown.ssim_median, 2),
        success=MISSING
        if shown.success_rate is None
        else f"{100 * shown.success_rate:.3g}",
      )
    )
  return out


def reference_rows(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
  """(name, median PSNR, median SSIM) of the guesses without an attack."""
  found = summary.get("references") or {}
  return [
    (
      REFERENCE_NAMES.get(name, name),
      fixed(values.get("psnr_db_median"), 1),
      fixed(values.get("ssim_median"), 2),
    )
    for name, values in found.items()
  ]


def used_columns(table: Sequence[Row]) -> list[str]:
  """Names of the columns that hold anything: an attack task has no accuracy."""
  return [
    name
    for name in Row._fields
    if any(getattr(row, name) != MISSING for row in table)
  ]


def markdown(summary: dict[str, Any]) -> str:
  """The main table and the reference rows as Markdown.

  Args:
    summary: `summary.json`.

  Returns:
    A table in GitHub's dialect, ending in a newline.
  """
  table = rows(summary)
  columns = used_columns(table)
  body = [[_escape(getattr(row, name)) for name in columns] for row in table]
  if "psnr" in columns:
    for name, psnr, ssim in reference_rows(summary):
      guess = {"defense": f"_{name}_", "attack": "no attack"}
      guess |= {"psnr": psnr, "ssim": ssim}
      body.append([guess.get(column, "") for column in columns])
  left = {"defense", "attack"}
  head = [getattr(HEADINGS, name) for name in columns]
  rule = [":--" if name in left else "--:" for name in columns]
  return joined([head, rule, *body])


def percent(share: float | None) -> str:
  """0.9712 -> 97.1."""
  return MISSING if share is None else f"{100 * share:.1f}"


def ratio(uplink: float | None, float32: float | None) -> str:
  """How much less or more crosses the wire than in float32."""
  if not uplink or not float32:
    return MISSING
  factor = max(float32 / uplink, uplink / float32)
  if round(factor, 2) == 1:
    return EQUAL
  digits = 0 if factor >= 99.95 else 1 if factor >= 9.995 else 2
  way = "less" if uplink < float32 else "more"
  return f"{factor:,.{digits}f}{TIMES} {way}"


def epsilon(entry: dict[str, Any]) -> str:
  """The epsilon of a mechanism with a proof, else that there is none."""
  value = entry.get("epsilon")
  if value is None:
    return "no proof"
  words = [f"{value:.3g}"]
  if entry.get("epsilon_unit") == "example":
    words.append("an example")
  if entry.get("epsilon_model") == "central":
    words.append("not against the server")
  return ", ".join(words)


def joined(lines: Iterable[Sequence[str]]) -> str:
  """A table's text: its head, the rule below and the rows, cell by cell."""
  return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def attack_name(attack: str, regime: str) -> str:
  """`dlg, blind`."""
  return f"{attack}, {regime}"


def _difference(
  name: str, accuracy: float | None, baseline: float | None
) -> str:
  if name == "none" or accuracy is None or baseline is None:
    return MISSING
  points = round(100 * (accuracy - baseline), 1)
  return f"{points:+.1f}".replace("-", MINUS) if points else "0.0"


def fixed(value: float | None, digits: int) -> str:
  """A number with so many digits after the point, or the sign for none."""
  if value is None:
    return MISSING
  # Adding zero takes the sign from a rounded zero.
  return f"{round(value, digits) + 0.0:.{digits}f}"


def _escape(text: str) -> str:
  return text.replace("|", "\\|")


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
  """Nested values as (dotted name, text)."""
  if isinstance(value, dict) and value:
    for name, inner in value.items():
      yield from flat(inner, f"{prefix}.{name}" if prefix else str(name))
  else:
    text = value if isinstance(value, str) else json.dumps(value)
    yield prefix, text
