"""From a template to a self-contained page: what all pages have in common."""

import base64
import pathlib
import re
from typing import Any

import jinja2
import markupsafe

from mpqfl_jax.report import tables


def write(folder: pathlib.Path, template: str, **values: Any) -> pathlib.Path:
  """Renders a template into a run's folder.

  Args:
    folder: the run's.
    template: its file's name, beside this module.
    **values: what the template names; one that is missing is an error.

  Returns:
    Path of `report.html`.
  """
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.filters |= {
    "data_uri": _data_uri,
    "units": _units,
    "breakable": _breakable,
  }
  path = folder / "report.html"
  text = environment.get_template(template).render(values)
  path.write_text(text, encoding="utf-8")
  return path


def write_table(
  folder: pathlib.Path, config: dict[str, Any], **values: Any
) -> pathlib.Path:
  """A page of some sentences, one figure and one table.

  Args:
    folder: the run's.
    config: of the run.
    **values: what else `table.html` names: `title`, `sentences`, `figure`,
      `headings`, `rows`, `references` (rows of what is no defence), `note`.

  Returns:
    Path of `report.html`.
  """
  subtitle = [
    config["dataset"],
    config["model"],
    f"{config['num_clients']:,} clients",
    f"batches of {config['batch_size']}",
    f"seed {config['seed']}",
  ]
  return write(
    folder,
    "table.html",
    subtitle=" · ".join(subtitle),
    config=list(tables.flat(config)),
    **values,
  )


def _data_uri(path: pathlib.Path) -> str:
  """A PNG file as the address of an embedded image."""
  return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _units(text: str) -> str:
  """Keeps a number and its unit on one line."""
  return re.sub(r"(\d) (dB|bytes|points)", "\\1\N{NO-BREAK SPACE}\\2", text)


def _breakable(name: str) -> markupsafe.Markup:
  """Lets a long name wrap after an underscore, comma, slash or bracket."""
  escaped = str(markupsafe.escape(name))
  return markupsafe.Markup(re.sub(r"([_,/(])", r"\1<wbr>", escaped))
