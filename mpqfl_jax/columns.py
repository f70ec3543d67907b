"""Rows of text in columns, for terminals."""

from collections.abc import Collection, Sequence


def aligned(
  rows: Sequence[Sequence[str]], left: Collection[int] = (0,)
) -> list[str]:
  """The rows as lines with their cells one below the other.

  Args:
    rows: cells; all rows have as many.
    left: columns that start on the left; the others, numbers, end on the right.
  """
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return [
    "  ".join(
      cell.ljust(width) if i in left else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ).rstrip()
    for row in rows
  ]
