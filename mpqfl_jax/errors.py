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
  near = difflib.get_close_matches(name, known, n=1)
  hint = f" Did you mean {near[0]!r}?" if near else ""
  return UserError(
    f"unknown {kind} {name!r}.{hint} Expected one of: {', '.join(known)}."
  )
