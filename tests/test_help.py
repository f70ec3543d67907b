"""What `--help` prints."""

import dataclasses
import pathlib
import re
import shlex
import subprocess
import sys

from absl import flags
from absl.testing import flagsaver
import pytest

from experiments import config, flag_definitions
from experiments import help as help_page


def test_every_flag_is_in_one_group():
  names = [name for group in flag_definitions.GROUPS.values() for name in group]
  assert len(set(names)) == len(names)
  fields = {field.name for field in dataclasses.fields(config.Config)}
  assert set(names) == fields | {"join_seconds"}


def test_the_page_shows_every_flag_and_its_default():
  text = help_page.text(flags.FLAGS)
  assert "--batch_size [10]" in text and "--resume [false]" in text
  assert "test:0-7" in text and "each attack's own" in " ".join(text.split())
  assert max(map(len, text.splitlines())) < 80
  for heading, names in flag_definitions.GROUPS.items():
    assert f"\n{heading}\n" in text
    assert all(f"  --{name}" in text for name in names)


@pytest.mark.parametrize("what, line", help_page.EXAMPLES)
def test_the_examples_are_commands_that_parse(what, line):
  with flagsaver.flagsaver():
    flags.FLAGS(["main", *shlex.split(line)])
    values = config.from_flags(flags.FLAGS)
    assert values.task in flag_definitions.TASKS


def test_the_first_example_is_the_tutorials():
  tutorial = pathlib.Path(__file__).parents[1] / "docs" / "tutorial.md"
  text = tutorial.read_text(encoding="utf-8").replace("\\\n", " ")
  (command,) = re.findall(r"^.*--output_dir=runs/first$", text, re.MULTILINE)
  _, line = help_page.EXAMPLES[0]
  assert shlex.split(command)[3:] == shlex.split(line)


@pytest.mark.parametrize(
  "flag, words",
  [
    ("--num_clients=-5", "-5 is not a positive integer. --help"),
    ("--rounds=1,2", "flag --rounds=1,2: expected a whole number. --help"),
    ("--client_lr=x", "flag --client_lr=x: expected a number. --help"),
    ("--resume=maybe", "flag --resume=maybe: expected true or false. --help"),
    (
      "--flagfile=no.flags",
      "cannot open --flagfile=no.flags: No such file or directory. Expected",
    ),
  ],
)
def test_a_flag_that_cannot_be_read_is_told_in_sentences(flag, words):
  with flagsaver.flagsaver(), pytest.raises(flags.Error) as caught:
    flags.FLAGS(["main", flag])
  said = help_page.mistake(caught.value)
  assert words in said
  assert "Errno" not in said and "literal" not in said and "\n" not in said


def test_help_is_printed_and_may_be_cut_short():
  command = f"{shlex.quote(sys.executable)} -m experiments.main --help"
  done = subprocess.run(
    ["bash", "-c", f"{command} | head -3"], capture_output=True, text=True
  )
  assert done.stdout.startswith("python -m experiments.main")
  assert done.stderr == ""
