"""The little language of flags: `name`, `name(key=value,...)`, and lists."""

import ast
import inspect
from typing import Any

from mpqfl_jax import errors


def split(text: str) -> list[str]:
  """Splits a comma-separated list, leaving commas in parentheses alone.

  Args:
    text: such as `none,prune(ratio=0.9),dp_gaussian(clip=1,noise=0.1)`.

  Returns:
    The items, stripped; empty ones are dropped.

  Raises:
    UserError: parentheses do not match.
  """
  items, depth, start = [], 0, 0
  for i, char in enumerate(text):
    depth += (char == "(") - (char == ")")
    if depth < 0:
      break
    if char == "," and depth == 0:
      items.append(text[start:i])
      start = i + 1
  if depth != 0:
    raise errors.UserError(
      f"parentheses do not match in {text!r}. Expected a list such as "
      "none,prune(ratio=0.9)."
    )
  items.append(text[start:])
  return [item.strip() for item in items if item.strip()]


def parse(text: str) -> tuple[str, dict[str, Any]]:
  """Parses `name(key=value,...)`.

  Values are Python literals, `true` or `false`; another bare word is a string.

  Args:
    text: one item, such as `qsgd(levels=4,norm=max)`.

  Returns:
    (name, parameters).

  Raises:
    UserError: not of this form, or a key given twice.
  """
  text = text.strip()
  name, parenthesis, rest = text.partition("(")
  name = name.strip()
  if not name or (parenthesis and not rest.endswith(")")):
    raise _malformed(text)
  params: dict[str, Any] = {}
  for item in split(rest[:-1]) if parenthesis else []:
    key, equals, value = item.partition("=")
    key, value = key.strip(), value.strip()
    if not equals or not key.isidentifier() or not value or key in params:
      raise _malformed(text)
    if value in ("true", "false"):
      params[key] = value == "true"
      continue
    try:
      params[key] = ast.literal_eval(value)
    except (ValueError, SyntaxError):
      params[key] = value
  return name, params


def _malformed(text: str) -> errors.UserError:
  return errors.UserError(
    f"cannot read {text!r}. Expected name or name(key=value,...), each key "
    "once, such as dp_gaussian(clip=1.0,noise_multiplier=0.1)."
  )


def call(kind: str, constructor, params: dict[str, Any], *args) -> Any:
  """Calls `constructor(*args, **params)`, naming parameters it does not take.

  Args:
    kind: what is built, for the message: `defense dp_gaussian`.
    constructor: a function whose keyword parameters are the known ones.
    params: what the user gave.
    *args: passed by position.

  Raises:
    UserError: an unknown or a missing parameter.
  """
  signature = inspect.signature(constructor)
  names = list(signature.parameters)[len(args) :]
  if params and not names:
    raise errors.UserError(
      f"{kind} takes no parameters, and got {', '.join(params)}. Expected"
      f" {kind.split()[-1]} alone."
    )
  for key in params:
    if key not in names:
      raise errors.unknown_name(f"parameter of {kind}", key, names)
  missing = [
    name
    for name in names
    if signature.parameters[name].default is inspect.Parameter.empty
    and name not in params
  ]
  if missing:
    raise errors.UserError(
      f"{kind} needs {', '.join(missing)}. Expected, for instance, "
      f"{kind.split()[-1]}({missing[0]}=...)."
    )
  return constructor(*args, **params)
