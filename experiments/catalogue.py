"""What flags can name, for `python -m experiments.main list`."""

from collections.abc import Iterator
import functools
import inspect
from typing import Any

from mpqfl_jax import (
  aggregate,
  attacks,
  datasets,
  defenses,
  errors,
  models,
  precision,
  schedules,
)

# Of constructors: what the package gives them, and no flag can.
_GIVEN = (
  "auxiliary",
  "leakage",
  "model",
  "params",
  "protocol",
  "shape",
  "work",
)


def sections() -> dict[str, dict[str, tuple[str, str]]]:
  """Heading -> name -> (its parameters with their defaults, one line)."""
  return {
    "Data sets (--dataset)": {
      **{
        name: ("", f"embedded sample of {info.full}")
        for name, info in datasets.SAMPLES.items()
      },
      **{
        name: ("", f"{_size(info)}, by tensorflow-datasets")
        for name, info in datasets.FULL_SETS.items()
      },
    },
    "Models (--model)": {
      name: ("", line) for name, (_, line) in models.MODELS.items()
    },
    "Codecs (--defense, --downlink)": {
      name: (_parameters(precision.LEAF_CODECS.get(name, codec)[1]), codec[0])
      for name, codec in precision.CODECS.items()
    },
    "Other defences (--defense)": _flipped(defenses.TRANSFORMING),
    "Attacks (--attack)": _flipped(attacks.ATTACKS),
    "Aggregators (--aggregator)": _flipped(aggregate.AGGREGATORS),
    "Schedules (--client_lr_schedule, --server_lr_schedule)": _flipped(
      {
        # Given by position: the rate, and the rounds after the warm-up.
        name: (functools.partial(build, 1.0, 1), line)
        for name, (build, line) in schedules.SCHEDULES.items()
      }
    ),
  }


def text(wanted: list[str]) -> str:
  """The tables, or those whose headings hold one of the words.

  Args:
    wanted: such as `attacks` or `codecs`; everything where empty.

  Raises:
    UserError: a word that no heading holds.
  """
  found = sections()
  for word in wanted:
    headings = [heading.split(" (")[0].lower() for heading in found]
    if not any(word.lower() in heading for heading in headings):
      raise errors.unknown_name("list", word, headings)
  return "\n\n".join(
    "\n".join(_lines(heading, entries))
    for heading, entries in found.items()
    if not wanted or any(word.lower() in heading.lower() for word in wanted)
  )


def _lines(heading: str, entries: dict[str, tuple[str, str]]) -> Iterator[str]:
  yield heading
  width = max(len(name) for name in entries)
  for name, (parameters, line) in entries.items():
    yield f"  {name:{width}}  {line}"
    if parameters:
      yield f"  {'':{width}}  ({parameters})"


def _flipped(table: dict[str, tuple[Any, str]]) -> dict[str, tuple[str, str]]:
  return {name: (_parameters(f), line) for name, (f, line) in table.items()}


def _parameters(constructor: Any) -> str:
  """`key=default` of what the parentheses of a flag may hold."""
  return ", ".join(
    name
    if parameter.default is parameter.empty
    else f"{name}={parameter.default}"
    for name, parameter in inspect.signature(constructor).parameters.items()
    if name not in _GIVEN and parameter.kind is not parameter.VAR_KEYWORD
  )


def _size(info: datasets.SetInfo) -> str:
  height, width, channels = info.image_shape
  return f"{len(info.class_names)} classes of {height}x{width}x{channels}"
