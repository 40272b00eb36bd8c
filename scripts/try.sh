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

STAGES="NEGOTIATE CONNECT HELO MAIL RCPT DATA HEADER EOH BODY EOM CLOSE"
LIMIT=60 # seconds for the whole conversation, which takes less than one

# Wait for the inspector's end; anything but 0 is a failure.
expect_end() {
    code=0
    wait "$inspector" || code=$?
    inspector=
    case $code in
    0) ;;
    124 | 137) die "milter inspect did not end within $LIMIT seconds." ;;
    *) die "milter inspect ended with exit code $code." ;;
    esac
}

cleanup() {
    if [ -n "${inspector:-}" ]; then kill "$inspector" 2>/dev/null || true; fi
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

step "Starting milter inspect unix:$work/socket"
mkfifo "$work/messages"
timeout --foreground -k 10 "$LIMIT" \
    "$VENV/bin/milter" inspect "unix:$work/socket" >"$work/stages" 2>"$work/messages" &
inspector=$!
exec 3<"$work/messages"
ready=
while [ -z "$ready" ] && IFS= read -r line <&3; do
    echo "$line"
    case $line in "inspecting on "*) ready=yes ;; esac
done
if [ -z "$ready" ]; then
    expect_end
    die "milter inspect ended before it was ready."
fi

step "Sending a message with milter check unix:$work/socket"
"$VENV/bin/milter" check "unix:$work/socket"

step "Stopping milter inspect with SIGTERM"
kill -TERM "$inspector"
cat <&3 # to the end of its messages, which is its own end
expect_end

step "Reading what milter inspect has printed"
cat "$work/stages"
for stage in $STAGES; do
    if ! grep -q "^\[[0-9]*\] $stage\$" "$work/stages"; then die "The stage $stage is missing."; fi
done

echo "All of it worked. Now with a filter of yours, or with your MTA: $PWD/$VENV/bin/milter --help"
