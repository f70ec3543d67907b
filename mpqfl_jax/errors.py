"""The error that a user's mistake raises."""

from collections.abc import Iterable
import difflib


class UserError(ValueError):
  """A mistake in what the user gave: the message says how to mend it.

  The command line prints the message as one line and exits with status 2.
  """


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
  """The error for a name that no table holds, with the nearest right one."""
  known = sorted(known)
  return UserError(
    f"unknown {kind} {name!r}.{did_you_mean(name, known)} Expected one of:"
    f" {', '.join(known)}."
  )


def did_you_mean(name: str, known: Iterable[str]) -> str:
  """A sentence with the nearest right name, a space before it; else nothing."""
  near = difflib.get_close_matches(name, sorted(known), n=1)
  return f" Did you mean {near[0]!r}?" if near else ""
