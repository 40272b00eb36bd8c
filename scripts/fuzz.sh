#!/bin/sh
# SPDX-License-Identifier: GPL-3.0-or-later
# Fuzz the library: conversations that no MTA would have, against filters in processes of their own.
#
#   sh scripts/fuzz.sh                          a fixed number of conversations, as the tests do: about a minute
#   sh scripts/fuzz.sh --seconds N [--seed S]   for N seconds, from seed S [1]: half of the time with the sanitizers
#                                               of the compiler
#   --libmilter                                 also libmilter itself with the sanitizers, from Debian's source
#                                               package, fetched with apt-get; or from the directory MILTER_SOURCE
#
# A failure tells a seed; "python -m tests.fuzz --seed SEED --count 1" sends that conversation again.
# MILTER_LINK=static or shared says how libmilter is linked. Makes .venv-test, like scripts/test.sh.

set -eu
CDPATH='' cd -- "$(dirname -- "$0")/.."
. scripts/debian.sh

cleanup() {
    if [ -n "${temporary:-}" ]; then rm -rf "$temporary"; fi
}

seconds=
seed=1
from_source=
while [ $# -gt 0 ]; do
    case $1 in
        --seconds) seconds=${2:?--seconds needs a number} && shift 2 ;;
        --seed) seed=${2:?--seed needs a number} && shift 2 ;;
        --libmilter) from_source=yes && shift ;;
        *) die "$1 is no option of $0; there are --seconds N, --seed S and --libmilter" ;;
    esac
done
case $seconds$seed in
    *[!0-9]*) die "--seconds and --seed take whole numbers" ;;
esac

# Debian's source of libmilter, from the same repositories as the packages; unpacked into $1. Needs no root.
fetch_source() (
    cd "$1"
    mkdir lists lists/partial cache
    # The names in $() are apt-get's.
    # shellcheck disable=SC2016
    apt-get indextargets --format 'deb-src $(SITE) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' |
        grep debian | sort -u >sources.list
    set -- -o "Dir::Etc::SourceList=$1/sources.list" -o Dir::Etc::SourceParts=/dev/null \
        -o "Dir::State::Lists=$1/lists" -o "Dir::Cache=$1/cache" -o "APT::Sandbox::User=$(id -un)"
    apt-get -qq "$@" update
    apt-get -qq "$@" source --download-only sendmail
    tar xf sendmail_*.orig.tar.*z
)

# Hypothesis, a batch of seeds after the other until the time is over.
explore() {
    end=$(($(date +%s) + $1))
    batch=$seed
    while [ "$(date +%s)" -lt "$end" ]; do
        env MILTER_FUZZ_EXAMPLES=200 MILTER_FUZZ_SEED="$batch" \
            python -m pytest -q -p no:cacheprovider tests/fuzz/test_conversations.py
        batch=$((batch + 1))
    done
    echo "Hypothesis: 1200 conversations for each seed from $seed to $((batch - 1))"
}

begin
install_packages
use_venv .venv-test
step "Building, libmilter linked ${MILTER_LINK:-as the system allows}"
(export MILTER_STRICT=1 && pip_install --editable '.[test]')
PATH=$PWD/$VENV/bin:$PATH
export PATH

# Short, for the paths of Unix sockets.
temporary=$(mktemp -d "${TMPDIR:-/tmp}/milter.XXXXXX")
export PYTEST_DEBUG_TEMPROOT="$temporary"
if [ -n "$from_source" ] && [ -z "${MILTER_SOURCE:-}" ]; then
    step "Fetching the source of libmilter"
    mkdir "$temporary/source"
    fetch_source "$temporary/source"
    MILTER_SOURCE=$(echo "$temporary"/source/sendmail-*/)
    export MILTER_SOURCE
fi

if [ -z "$seconds" ]; then
    step "Fuzzing with a fixed number of conversations, seed $seed"
    env MILTER_FUZZ_SEED="$seed" python -m pytest -q tests/fuzz
else
    step "Mutated conversations with sanitizers, seed $seed, $((seconds / 2)) seconds"
    python -m tests.fuzz --sanitized --seconds $((seconds / 2)) --seed "$seed"
    step "Mutated conversations, seed $seed, $((seconds / 4)) seconds"
    python -m tests.fuzz --seconds $((seconds / 4)) --seed "$seed"
    step "Conversations of Hypothesis, seed $seed, $((seconds / 4)) seconds"
    explore $((seconds / 4))
fi
step "Nothing found"
