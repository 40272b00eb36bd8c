# SPDX-License-Identifier: GPL-3.0-or-later
"""The documentation's site, made by Sphinx: `sh scripts/docs.sh`. Warnings are errors there."""

import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import commands  # noqa: E402 (where it is had to be said first)
import figures  # noqa: E402

from milter import __version__  # noqa: E402

project = "milter"
author = "the authors of milter"
copyright = "the authors of milter, GPL-3.0-or-later"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.intersphinx"]
exclude_patterns = ["_build"]
# Pages that are not there yet in every branch.
suppress_warnings = ["toc.empty_glob"]

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
autodoc_class_signature = "separated"
autodoc_default_options = {"exclude-members": "__init__, __new__"}
autodoc_type_aliases = {"ClientAddress": "ClientAddress", "Verdict": "Verdict", "OnError": "OnError"}
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
intersphinx_mapping: dict[str, Any] = {}  # the site is built without a network
default_role = "code"
