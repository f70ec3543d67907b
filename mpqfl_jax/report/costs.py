"""What each defence costs, as a table: bytes, seconds, keys."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from mpqfl_jax.report import tables

Line = dict[str, Any]


class Row(NamedTuple):
  """A defence's costs as text."""

  defense: str
  uplink: str
  downlink: str
  train: str
  send: str
  server: str
  keys: str


HEADINGS = Row(
  defense="Defence",
  uplink="Uplink, bytes",
  downlink="Downlink, bytes",
  train="Client trains, ms",
  send="Client protects and packs, ms",
  server="Server, ms a client",
  keys="Keys",
)


def rows(lines: Sequence[Line]) -> Iterator[Row]:
  """The lines of `costs.jsonl` as text."""
  for line in lines:
    yield Row(
      defense=line["defense"],
      uplink=f"{line['uplink_bytes']:,}",
      downlink=f"{line['downlink_bytes']:,}",
      train=_milliseconds(line["train_seconds"]),
      send=_milliseconds(line["send_seconds"]),
      server=_milliseconds(line["server_seconds"]),
      keys=keys(line),
    )


def keys(line: Line) -> str:
  """How making and handing out keys grows, or that there are none."""
  made = [k for k in line["keys"] if k["pairs"]]
  if not made:
    return "none"
  return "; ".join(
    f"{k['seconds']:.2g} s, {_megabytes(k['bytes'])} for {k['clients']:,}"
    for k in made
  )


def markdown(lines: Sequence[Line]) -> str:
  """The table in GitHub's dialect, ending in a newline.

  Args:
    lines: of `costs.jsonl`.
  """
  head = list(HEADINGS)
  rule = [":--", *["--:"] * 5, ":--"]
  return tables.joined([head, rule, *rows(lines)])


def _milliseconds(seconds: float) -> str:
  value = 1e3 * seconds
  return tables.fixed(value, 2 if value < 10 else 1 if value < 100 else 0)


def _megabytes(size: int) -> str:
  return f"{size / 1e6:,.3g} MB" if size < 1e9 else f"{size / 1e9:,.3g} GB"
