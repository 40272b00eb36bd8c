#!/bin/sh
# SPDX-License-Identifier: GPL-3.0-or-later
# Make the documentation's site from docs/ and the docstrings. Warnings are errors.
#
#   sh scripts/docs.sh
#
# Makes .venv-docs in the project directory, milter/_shim*.so, and build/site; begin to read at build/site/index.html.
# PYTHON names the interpreter [python3].

set -eu
CDPATH='' cd -- "$(dirname -- "$0")/.."
. scripts/debian.sh

cleanup() { :; }

begin
install_packages
use_venv .venv-docs
step "Building the library, which the reference is made from"
pip_install --editable '.[docs]'
step "Making the site"
build_site
echo "$PWD/build/site/index.html"
