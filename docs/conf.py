# SPDX-License-Identifier: GPL-3.0-or-later
"""The documentation's site, made by Sphinx: `sh scripts/docs.sh`. Warnings are errors there."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from sphinx.application import Sphinx
from sphinx.ext.napoleon import Config, GoogleDocstring
from sphinx.pycode import ModuleAnalyzer

from docs import commands, figures
from milter import __version__

project = "milter"
author = "the authors of milter"
copyright = "the authors of milter, GPL-3.0-or-later"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"milter {release}"
html_copy_source = False
html_show_sphinx = False

# ---- Markdown

myst_enable_extensions = ["colon_fence", "deflist", "substitution"]
myst_heading_anchors = 3
myst_substitutions = {**figures.substitutions(), **commands.substitutions()}

# ---- Reference from docstrings

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
autodoc_default_options = {"exclude-members": "__init__, __new__"}
autodoc_type_aliases = {"ClientAddress": "ClientAddress", "Verdict": "Verdict", "OnError": "OnError"}
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
default_role = "code"

NAPOLEON = Config(napoleon_numpy_docstring=False, napoleon_use_rtype=False)


def read_arguments(app: Sphinx, what: str, name: str, documented: object, options: object, lines: list[str]) -> None:
    """The sections "Arguments:" and "Raises:" of a docstring. (As an extension, napoleon would take "a type" out of
    the first line of a property that has a colon.)"""
    if what not in ("property", "attribute", "data"):
        lines[:] = GoogleDocstring(lines, NAPOLEON, app, what, name, documented, options).lines()


MADE_BY_THE_LIBRARY = {
    *("milter.Context", "milter.EomContext", "milter.NegotiateContext", "milter.context.Macros"),
    *("milter.Message", "milter.Headers", "milter.Recipients", "milter.Server"),
}


def leave_out_signatures(
    app: Sphinx, what: str, name: str, documented: object, options: object, signature: str, result: str
) -> tuple[str, str] | None:
    """Of what nobody makes but the library."""
    return ("", "") if name in MADE_BY_THE_LIBRARY else None


def show_all_options_of_milter(app: Sphinx) -> None:
    """Its overloads are for type checkers; people want to see each option with its default."""
    analyzer = ModuleAnalyzer.for_module("milter.app")
    analyzer.analyze()
    analyzer.overloads.pop("Milter.__init__")


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", read_arguments)
    app.connect("autodoc-process-signature", leave_out_signatures)
    app.connect("builder-inited", show_all_options_of_milter)
