"""What the site has beside `docs/`: the README, examples, figures, notebooks.

MkDocs loads this file; see `hooks` in mkdocs.yml. Links of a page are those of
the repository, so that they work in both places.
"""

import ast
import pathlib
import posixpath
import re

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Pages from outside of docs/, and the folder whose scripts make one.
PAGES = {
  "README.md": "index.md",
  "ARCHITECTURE.md": "architecture.md",
  "CHANGELOG.md": "changelog.md",
}
EXAMPLES, EXAMPLES_PAGE = "examples", "examples.md"
# Not pages: shown or offered as they are.
FILES = ("results/**/*.png", "notebooks/*.ipynb", "mpqfl_jax/data/README.md")

_LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")


def on_files(files, config):
  for source, page in PAGES.items():
    text = _linked((ROOT / source).read_text(encoding="utf-8"), "")
    files.append(File.generated(config, page, content=text))
  files.append(File.generated(config, EXAMPLES_PAGE, content=_examples()))
  for pattern in FILES:
    for path in sorted(ROOT.glob(pattern)):
      name = path.relative_to(ROOT).as_posix()
      # A page of its own would need links of its own.
      place = name.replace(".md", ".txt")
      files.append(File.generated(config, place, abs_src_path=str(path)))
  return files


def on_page_markdown(markdown, page, config, files):
  if page.file.abs_src_path is None or page.file.src_uri in PAGES.values():
    return markdown
  return _linked(markdown, posixpath.dirname(f"docs/{page.file.src_uri}"))


def _linked(markdown: str, folder: str) -> str:
  """Links as the site has them; of a page in a folder of the repository."""

  def place(match: re.Match) -> str:
    start, target, anchor, end = match.groups()
    if "://" in target or target.startswith("mailto:"):
      return match.group()
    path = posixpath.normpath(posixpath.join(folder, target))
    if path in PAGES:
      path = PAGES[path]
    elif path == EXAMPLES:
      path = EXAMPLES_PAGE
    elif path.startswith(f"{EXAMPLES}/"):
      # The heading of a script is its name, without the dot in an anchor.
      script = posixpath.basename(path).replace(".", "")
      path, anchor = EXAMPLES_PAGE, f"#{script}"
    elif path.startswith("docs/"):
      path = path.removeprefix("docs/")
    elif path.endswith(".md"):
      path = path.replace(".md", ".txt")
    here = folder.removeprefix("docs").strip("/")
    path = posixpath.relpath(path, here) if here else path
    return f"{start}{path}{anchor or ''}{end}"

  return _LINK.sub(place, markdown)


def _examples() -> str:
  parts = ["# Short scripts", "Each is run by a test."]
  for path in sorted((ROOT / EXAMPLES).glob("*.py")):
    text = path.read_text(encoding="utf-8")
    title = ast.get_docstring(ast.parse(text)) or ""
    parts += [f"## {path.name}", title, f"```python\n{text}```"]
  return "\n\n".join(parts) + "\n"
