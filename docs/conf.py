"""The documents as a site: `make docs`. See Sphinx for what each name means."""

import html
import pathlib
import re
import sys

from docutils import nodes
from docutils.parsers.rst import Directive

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from diffit_jax import __version__  # noqa: E402
from diffit_jax.console import COMMANDS  # noqa: E402

project = "diffit_jax"
author = copyright = "The diffit_jax authors"
version = release = __version__
extensions = [
  "myst_parser",
  "sphinx.ext.apidoc",
  "sphinx.ext.autodoc",
  "sphinx.ext.napoleon",
  "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]

# Documents are Markdown that a repository's page shows as well.
myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["mermaid"]
myst_heading_anchors = 3

# The reference is made of the docstrings of every public module.
apidoc_modules = [
  {
    "path": "../diffit_jax",
    "destination": "api",
    "separate_modules": True,
    "module_first": True,
    "automodule_options": {"members", "show-inheritance"},
    # Programs: their flags are what --help says.
    "exclude_patterns": [
      f"../diffit_jax/{name}.py" for name in {"console", *COMMANDS.values()}
    ],
  }
]
add_module_names = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "description"
# 200 pages in the tree at the side of every page would take most of the time.
suppress_warnings = ["toc.not_included"]
autodoc_mock_imports = ["gradio", "fastapi", "uvicorn", "starlette"]
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"diffit_jax {__version__}"
html_static_path = ["_build/static"]
html_js_files = ["mermaid.min.js"]  # brought by `make docs`
html_show_sphinx = False


class Mermaid(Directive):
  """A drawing, which the page itself draws of its text."""

  has_content = True

  def run(self) -> list[nodes.Node]:
    text = html.escape("\n".join(self.content))
    # Its lines are dark on a dark page, too.
    style = "background: white; text-align: center"
    drawing = f'<pre class="mermaid" style="{style}">{text}</pre>'
    return [nodes.raw("", drawing, format="html")]


_SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields):$")
_ENTRY = re.compile(r"( +[\w.*, ]+: )(.*)")


def as_plain_text(app, what, name, obj, options, lines) -> None:
  """Docstrings are plain text in which `marks` enclose code."""
  del app, what, name, obj, options
  end = next((i for i, x in enumerate(lines) if _SECTION.match(x)), len(lines))
  paragraphs = "\n".join(lines[:end]).split("\n\n")
  prose = [line for text in paragraphs for line in [*_prose(text), ""]]
  lines[:] = [*prose, *map(_entry, lines[end:])]


def _prose(text: str) -> list[str]:
  """A paragraph; equations, drawings and tables stay as they are."""
  lines = text.strip("\n").split("\n")
  if any(re.match(r" |.*[|=]{2}", x) for x in lines) and lines[0][:2] != "- ":
    return ["::", "", *(f"  {line}" for line in lines)]
  return [_escape(line) for line in lines]


def _entry(line: str) -> str:
  """A line below "Args:" and its like, of which the name is the reader's."""
  if _SECTION.match(line):
    return line
  entry = _ENTRY.fullmatch(line)
  name, text = entry.groups() if entry else ("", line)
  return name + _escape(text)


def _escape(text: str) -> str:
  parts = re.split(r"(`[^`]+`)", text)
  return "".join(
    f"`{part}`" if i % 2 else re.sub(r"([*_|\\`])", r"\\\1", part)
    for i, part in enumerate(parts)
  )


def _link_within(app, path, name, text) -> None:
  """The README's links to files beside it lead to pages that hold them."""
  del app, path, name
  text[0] = text[0].replace("(CHANGELOG.md)", "(changes.md)")
  text[0] = text[0].replace("(CONTRIBUTING.md)", "(contributing.md)")


def setup(app) -> None:
  app.add_directive("mermaid", Mermaid)
  app.connect("include-read", _link_within)
  app.connect("autodoc-process-docstring", as_plain_text, priority=100)
