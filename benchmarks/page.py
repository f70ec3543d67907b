"""Generated tables in pages: text between two comments that name a block."""

import pathlib
import re


def put(path: pathlib.Path, block: str, text: str) -> None:
  """Replaces a block of a page.

  Args:
    path: the page, with one `<!-- block: begin -->` and one
      `<!-- block: end -->`.
    block: its name.
    text: what shall stand there.

  Raises:
    ValueError: the page has no such block, or several.
  """
  page = path.read_text(encoding="utf-8")
  begin, end = (f"<!-- {block}: {word} -->" for word in ("begin", "end"))
  pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.S)
  if len(pattern.findall(page)) != 1:
    raise ValueError(f"{path}: expected one {begin} and one {end}")
  filled = f"{begin}\n\n{text.strip()}\n\n{end}"
  path.write_text(pattern.sub(lambda _: filled, page), encoding="utf-8")
