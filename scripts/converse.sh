#!/bin/sh
# SPDX-License-Identifier: GPL-3.0-or-later
# See an installed library at work: "milter inspect" prints every stage of a conversation, "milter check" plays the
# MTA and sends it a message. Ends with 0 if all of it worked.
#
#   sh scripts/converse.sh MILTER DIRECTORY
#
# MILTER is the command that was installed; the socket and what was printed lie in DIRECTORY, whose path must be short.

set -eu
# shellcheck source=scripts/debian.sh
. "$(dirname -- "$0")/debian.sh"

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
}

begin
milter=$1
work=$2

step "Starting milter inspect unix:$work/socket"
mkfifo "$work/messages"
timeout --foreground -k 10 "$LIMIT" "$milter" inspect "unix:$work/socket" >"$work/stages" 2>"$work/messages" &
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
"$milter" check "unix:$work/socket"

step "Stopping milter inspect with SIGTERM"
kill -TERM "$inspector"
cat <&3 # to the end of its messages, which is its own end
expect_end

step "Reading what milter inspect has printed"
cat "$work/stages"
for stage in $STAGES; do
    if ! grep -q "^\[[0-9]*\] $stage\$" "$work/stages"; then die "The stage $stage is missing."; fi
done
