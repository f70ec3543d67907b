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
  """The tables, or what some words ask for.

  Args:
    wanted: each in the heading of a table, such as `attacks` or `codecs`, which
      is then shown whole, or in the names of entries, such as `dp`; everything
      where empty.

  Raises:
    UserError: a word that neither a heading nor a name holds.
  """
  found = sections()
  if not wanted:
    return _tables(found)
  shown: dict[str, dict[str, tuple[str, str]]] = {name: {} for name in found}
  for word in map(str.lower, wanted):
    headings = [h for h in found if word in h.split(" (")[0].lower()]
    for heading in headings:
      shown[heading] |= found[heading]
    names = {
      heading: {n: entry for n, entry in entries.items() if word in n.lower()}
      for heading, entries in found.items()
    }
    if not headings and not any(names.values()):
      tables = [heading.split(" (")[0].lower() for heading in found]
      known = [*tables, *(n for entries in found.values() for n in entries)]
      raise errors.UserError(
        f"nothing that flags can name is called {word!r}."
        f"{errors.did_you_mean(word, known)} Expected a table"
        f" ({', '.join(tables)}) or a part of a name, such as dp."
      )
    for heading, entries in names.items() if not headings else ():
      shown[heading] |= entries
  return _tables(shown)


def _tables(found: dict[str, dict[str, tuple[str, str]]]) -> str:
  return "\n\n".join(
    "\n".join(_lines(heading, entries))
    for heading, entries in found.items()
    if entries
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
