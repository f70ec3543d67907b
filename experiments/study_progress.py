"""How far a study is, on a terminal: a line a data set, and the time left."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
import contextlib
import functools

import tqdm

from experiments.study_grid import Cell

# Heading of the count of each task's cells.
_KINDS = {"train": "training", "attack": "attacks", "costs": "costs"}


@contextlib.contextmanager
def table(
  cells: Sequence[Cell], todo: Sequence[Cell]
) -> Iterator[Callable[[Cell], None]]:
  """Shows a table of cells that are done, in place; nothing off a terminal.

  Args:
    cells: all of them.
    todo: those that are not done yet.

  Yields:
    (cell) -> None, to be called when one is done.
  """
  total, left = Counter(map(_place, cells)), Counter(map(_place, todo))
  names = list(dict.fromkeys(cell.config.dataset for cell in cells))
  wide = max(map(len, names))

  def text(dataset: str) -> str:
    parts = [
      f"{kind} {total[place] - left[place]:>3}/{total[place]:<3}"
      for task, kind in _KINDS.items()
      if total[place := (dataset, task)]
    ]
    return f"{dataset:<{wide}}  {'  '.join(parts)}"

  line = functools.partial(tqdm.tqdm, disable=None)
  rows = {name: line(bar_format="{desc}", desc=text(name)) for name in names}
  done = len(cells) - len(todo)
  whole = line(desc="study", initial=done, total=len(cells), unit="cell")

  def advance(cell: Cell) -> None:
    left[_place(cell)] -= 1
    dataset = cell.config.dataset
    rows[dataset].set_description_str(text(dataset))
    whole.set_postfix_str(cell.name)
    whole.update()

  try:
    yield advance
  finally:
    for each in (*rows.values(), whole):  # from above: each leaves its line
      each.close()


def _place(cell: Cell) -> tuple[str, str]:
  return cell.config.dataset, cell.config.task
