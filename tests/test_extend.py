"""docs/extend.md taken literally, section by section, in a copy."""

import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
_PAGE = (ROOT / "docs" / "extend.md").read_text()
SECTIONS = {
  part.splitlines()[0]: part
  for part in re.split(r"^## ", _PAGE, flags=re.M)[1:]
}
_BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.M | re.S)


def apply(changes: str, text: str) -> str:
  """A diff whose lines each stand once in the text, in any order."""
  lines, place = text.split("\n"), None
  for change in changes.splitlines():
    kind, line = change[0], change[1:]
    if kind == "+":
      assert place is not None, f"nothing before {line!r}"
      lines.insert(place, line)
      place += 1
      continue
    assert lines.count(line) == 1, f"{line!r} stands {lines.count(line)} times"
    place = lines.index(line)
    if kind == "-":
      del lines[place]
    else:
      place += 1
  return "\n".join(lines)


def blocks(section: str) -> list[tuple[str, str, str]]:
  """(language, path or nothing, text) of each."""
  return _BLOCK.findall(SECTIONS[section])


def test_every_block_is_taken():
  assert len(SECTIONS) == 8
  for name, text in SECTIONS.items():
    found = blocks(name)
    assert len(found) == text.count("```") // 2, name
    assert found[-1][0] == "sh", name
    for language, path, body in found:
      if language == "diff":
        apply(body, (ROOT / path).read_text())
      elif path:
        assert not (ROOT / path).exists(), path


@pytest.mark.slow
@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_does_what_it_says(section, tmp_path):
  copy = tmp_path / "copy"
  for folder in ("mpqfl_jax", "experiments", "tests"):
    shutil.copytree(
      ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__")
    )
  shutil.copy(ROOT / "pyproject.toml", copy)
  for language, path, body in blocks(section):
    if path:
      place = copy / path
      place.parent.mkdir(parents=True, exist_ok=True)
      text = apply(body, place.read_text()) if language == "diff" else body
      place.write_text(text)
      continue
    for line in body.splitlines():
      words = shlex.split(line)
      assert words[0] == "python"
      done = subprocess.run(
        [sys.executable, *words[1:]], cwd=copy, capture_output=True, text=True
      )
      assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
      if "--attack=adam" in words:
        assert "rebuilt 4 of 4 images" in done.stdout, done.stdout
      if words[2] == "pytest":
        assert re.search(r"\d+ passed", done.stdout), done.stdout
