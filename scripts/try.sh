#!/bin/sh
# SPDX-License-Identifier: GPL-3.0-or-later
# Install what is needed, build, and see the library at work: "milter inspect" prints every stage of a
# conversation, "milter check" plays the MTA and sends it a message. Ends with 0 if all of it worked.
#
#   sh scripts/try.sh
#
# Makes .venv-try in the project directory. PYTHON names the interpreter [python3].

set -eu
CDPATH='' cd -- "$(dirname -- "$0")/.."
. scripts/debian.sh

cleanup() {
    if [ -n "${work:-}" ]; then rm -rf "$work"; fi
}

begin
install_packages
use_venv .venv-try
work=$(mktemp -d "$VENV/run.XXXXXX")

step "Building and installing the project"
# Its own directory for building: what lies in build/ may be of another system.
printf '[build]\nbuild_base = %s\n' "$work/build" >"$work/setup.cfg"
(export DIST_EXTRA_CONFIG="$PWD/$work/setup.cfg" && pip_install .)
"$VENV/bin/milter" version

step "Seeing it at work"
sh scripts/converse.sh "$VENV/bin/milter" "$work"

echo "All of it worked. Now with a filter of yours, or with your MTA: $PWD/$VENV/bin/milter --help"
