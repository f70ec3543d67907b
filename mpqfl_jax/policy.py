"""Rules by path: which leaves they match, and the files that hold them."""

from collections.abc import Mapping, Sequence
import difflib
import fnmatch
import pathlib
import re
import tomllib
from typing import Any, NamedTuple

from mpqfl_jax import trees
from mpqfl_jax.errors import UserError
from mpqfl_jax.types import Params

# What a rule must have, as a file has it.
_LIKE = {"path": '"conv*"', "precision": '"int4"'}


class QuantRule(NamedTuple):
  """How the leaves that a pattern matches are sent.

  Attributes:
    path: a shell pattern (`conv*`, `*/bias`) that matches a leaf's whole path
      (`conv1/kernel`) or its layer (`conv1`).
    precision: a name in `precision.LEAF_CODECS`.
    options: keyword arguments of that codec: mode, granularity, rounding, ...
  """

  path: str
  precision: str
  options: Mapping[str, Any] = {}


def matches(pattern: str, path: str) -> bool:
  """Whether a rule's pattern matches a leaf, by its whole path or its layer."""
  return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(
    layer_of(path), pattern
  )


def assign(
  name: str, rules: Sequence[QuantRule], params: Params
) -> list[QuantRule]:
  """The first rule that matches each leaf, in the order of `jax.tree.leaves`.

  Args:
    name: of the policy.
    rules: in order of precedence.
    params: parameters, or their shapes.

  Raises:
    UserError: a leaf that no rule matches, or a rule that is first for no leaf.
  """
  unused = set(range(len(rules)))
  found = []
  paths = trees.leaf_names(params)
  for path in paths:
    for i, rule in enumerate(rules):
      if matches(rule.path, path):
        unused.discard(i)
        found.append(rule)
        break
    else:
      raise UserError(
        f"policy {name}: no rule matches {path!r}; add one, such as a last rule"
        " with path '*'."
      )
  if unused:
    rule = rules[min(unused)]
    raise UserError(
      f"policy {name}: rule {min(unused) + 1} (path {rule.path!r}) applies to"
      " no parameter, or earlier rules take all of its own; the model has"
      f" {', '.join(paths)}."
    )
  return found


def layers(params: Params) -> list[str]:
  """Names of the layers, numbers in them compared as numbers."""
  names = {layer_of(path) for path in trees.leaf_names(params)}
  return sorted(names, key=_natural)


def layer_of(path: str) -> str:
  """The layer of a leaf: `conv1` of `conv1/kernel`."""
  return path.rpartition("/")[0] or path


def read(path: pathlib.Path) -> tuple[str, list[QuantRule]]:
  """Reads a policy file: a list of rules, first match wins.

      [[rule]]
      path = "conv*"
      precision = "int4"
      mode = "affine"

      [[rule]]
      path = "*"
      precision = "float16"

  Args:
    path: the file.

  Returns:
    The policy's name (the file's, without its suffix) and its rules.

  Raises:
    UserError: the file cannot be read or is no policy.
  """
  try:
    content = tomllib.loads(path.read_text(encoding="utf-8"))
  except OSError as error:
    raise UserError(
      f"cannot read the policy file {path}: {error.strerror}. Expected a file"
      " of [[rule]] tables, such as experiments/policies/mixed_both.toml."
    ) from error
  except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
    raise UserError(
      f"policy file {path} is not TOML: {error}. Expected [[rule]] tables."
    ) from error
  rules = content.pop("rule", None)
  if content or not isinstance(rules, list) or not rules:
    raise UserError(
      f"policy file {path}: expected [[rule]] tables and nothing else"
      + (f", got {', '.join(map(repr, content))}." if content else ".")
    )
  parsed = []
  for i, rule in enumerate(rules, 1):
    where = f"policy file {path}, rule {i}"
    if not isinstance(rule, dict):
      raise UserError(f"{where} is {rule!r}. Expected a [[rule]] table.")
    for key in ("path", "precision"):
      if key not in rule:
        slip = difflib.get_close_matches(key, rule, n=1)
        if slip:
          raise UserError(
            f"{where}: unknown key {slip[0]!r}. Did you mean {key!r}?"
          )
        raise UserError(f"{where} has no {key}. Expected {key} = {_LIKE[key]}.")
      if not isinstance(rule[key], str):
        raise UserError(
          f"{where}: {key} is {rule[key]!r} and must be a string. Expected, for"
          f" instance, {key} = {_LIKE[key]}."
        )
    parsed.append(QuantRule(rule.pop("path"), rule.pop("precision"), rule))
  return path.stem, parsed


def _natural(name: str) -> list:
  return [
    (0, int(part), "") if part.isdigit() else (1, 0, part)
    for part in re.split(r"(\d+)", name)
  ]
