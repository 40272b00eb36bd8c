#!/bin/sh
# SPDX-License-Identifier: GPL-3.0-or-later
# Build for a free-threaded Python, and run the tests there with the GIL off.
#
#   PYTHON=python3.14t sh scripts/free-threading.sh [arguments for pytest]
#
# Makes .venv-free in the project directory, and milter/_shim*.so of that Python. Not run: the checks of types, whose
# tools need a GIL, and the tests inside MTAs, which are the same with any Python.

set -eu
CDPATH='' cd -- "$(dirname -- "$0")/.."
. scripts/debian.sh

cleanup() {
    if [ -n "${temporary:-}" ]; then rm -rf "$temporary"; fi
}

begin
install_packages
step "Looking for a free-threaded Python"
"$PYTHON" -c 'import sys, sysconfig; sys.exit(not sysconfig.get_config_var("Py_GIL_DISABLED"))' ||
    die "$PYTHON has a GIL for good. Name a free-threaded Python: PYTHON=python3.14t sh scripts/free-threading.sh"
use_venv .venv-free

step "Building with warnings as errors"
(export MILTER_STRICT=1 && pip_install --editable .)
quietly python -m pip install pytest hypothesis prometheus-client
"$VENV/bin/milter" version

step "Tests with the GIL off: pytest"
# Not in the project directory: the paths of Unix sockets must be short.
temporary=$(mktemp -d "${TMPDIR:-/tmp}/milter.XXXXXX")
export PYTEST_DEBUG_TEMPROOT="$temporary" PYTHON_GIL=0
PATH=$PWD/$VENV/bin:$PATH
export PATH
python -m pytest --ignore tests/mta --ignore tests/test_typing.py "$@"
