"""The reference site; built by docs/build.py from a copy of the repository's pages."""

import re

import scuvae

project = "scuvae"
author = "the scuvae developers"
copyright = author
release = version = scuvae.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
    "sphinx_design",
]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "off"  # tutorials/run.py executes them, and saves what came out
templates_path: list[str] = []
exclude_patterns = ["docs/site/index.md", "tests/**/cases/*"]

html_theme = "sphinx_book_theme"
html_title = "scuvae"
html_theme_options = {
    "show_toc_level": 2,
    "home_page_in_toc": True,
    "navbar_persistent": [],
    "use_download_button": True,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
html_static_path: list[str] = []
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80


def as_rst(docstring: list[str]) -> list[str]:
    """numpydoc's sections as rubrics; what is in them is reStructuredText as it stands."""
    out: list[str] = []
    lines = list(docstring)
    for i, line in enumerate(lines):
        if re.fullmatch(r"-{3,}", line):
            continue
        if i + 1 < len(lines) and re.fullmatch(r"-{3,}", lines[i + 1]):
            out += ["", f".. rubric:: {line}", ""]
        elif line.startswith("``") and out and re.fullmatch(r"``.*,", out[-1]):
            out[-1] += f" {line}"  # a term of a definition list is one line
        else:
            out.append(line)
    return out


def setup(app):
    def process(app, what, name, obj, options, lines):
        lines[:] = as_rst(lines)

    app.connect("autodoc-process-docstring", process)
