"""The table of a study's cells, as a terminal shows it."""

import io
from types import SimpleNamespace

from experiments import study_progress


class Terminal(io.StringIO):
  def isatty(self):
    return True


def cells():
  return [
    SimpleNamespace(
      config=SimpleNamespace(task=task, dataset=dataset),
      name=f"{dataset}, {task} {number}",
    )
    for dataset in ("mnist", "cifar10")
    for task, count in (("train", 3), ("attack", 2))
    for number in range(count)
  ]


def test_a_line_a_data_set_and_one_of_all(monkeypatch):
  stream = Terminal()
  monkeypatch.setattr("sys.stderr", stream)
  everything = cells()
  with study_progress.table(everything, everything[1:]) as advance:
    for cell in everything[1:7]:
      advance(cell)
  text = stream.getvalue()
  # One was there before; no task is named that no cell has.
  assert "mnist    training   1/3    attacks   0/2" in text
  assert "mnist    training   3/3    attacks   2/2" in text
  assert "cifar10  training   2/3    attacks   0/2" in text
  assert "costs" not in text
  last = text[text.rindex("study:") :]
  assert " 7/10 " in last and "cifar10, train 1" in last


def test_quiet_where_there_is_no_terminal(capsys):
  everything = cells()
  with study_progress.table(everything, everything) as advance:
    advance(everything[0])
  assert capsys.readouterr() == ("", "")
