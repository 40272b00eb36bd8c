#!/bin/sh
# SPDX-License-Identifier: GPL-3.0-or-later
# Install what is needed, build with the compiler's warnings as errors, and run all checks and tests.
#
#   sh scripts/test.sh [arguments for pytest]
#
# Makes .venv-test in the project directory, and milter/_shim*.so. PYTHON names the interpreter [python3].
# Temporary files of the tests are removed afterwards; "KEEP=yes sh scripts/test.sh" leaves them.
# Sendmail, which would replace Postfix if it was installed, is unpacked below .mta in the project directory.
# The tests inside Postfix and Sendmail need root; without it they are skipped, or, where CI is set, fail.

set -eu
CDPATH='' cd -- "$(dirname -- "$0")/.."
. scripts/debian.sh

cleanup() {
    if [ -z "${temporary:-}" ]; then return; fi
    if [ -n "${KEEP:-}" ]; then echo "Temporary files: $temporary"; else rm -rf "$temporary"; fi
}

# Both ways to link libmilter are tested. What they share (the C code under stress, the documentation's
# examples, the tools) is tested once.
build() {
    step "Building with warnings as errors, libmilter linked $1"
    (export MILTER_STRICT=1 MILTER_LINK="$1" && pip_install --editable '.[test]')
}

# Run one check, the others too if it fails.
check() {
    step "$1"
    name=$1
    shift
    "$@" || failed="${failed:+$failed; }$name"
}

check_documentation() {
    set -- milter README.md
    if [ -d docs ]; then set -- "$@" docs; fi
    python -m pytest -q --doctest-modules --doctest-glob='*.md' --ignore-glob='docs/*.py' "$@"
}

# libmilter as others build it. Under CI it must be possible.
check_threads() {
    source=${SENDMAIL_SOURCE:-$(debian_source "$temporary/sendmail")}
    if [ -z "$source" ] && [ -z "${CI:-}" ]; then
        echo "   No tests with a libmilter of threads and without IPv6: Debian's source of Sendmail cannot be had here,"
        echo "   and SENDMAIL_SOURCE names none."
        return
    fi
    check "Threads, no IPv6: scripts/test-all.sh" env SENDMAIL_SOURCE="$source" KINDS=thread EXTRA=test-core \
        sh scripts/test-all.sh tests/test_hostile_mta.py tests/test_libmilter.py tests/test_scheduler.py
}

begin
# Without libsasl2-modules Postfix knows no way to log in, which a test does.
install_packages miltertest libsasl2-modules
install_postfix
unpack_sendmail
use_venv .venv-test

build shared
PATH=$PWD/$VENV/bin:$PATH
export PATH

# Not in the project directory: the paths of Unix sockets must be short.
temporary=$(mktemp -d "${TMPDIR:-/tmp}/milter.XXXXXX")
export PYTEST_DEBUG_TEMPROOT="$temporary"

failed=
# What takes long and asks little of the link is left to the other one, and of the fuzzing a part.
check "Tests with the shared libmilter: pytest" env MILTER_FUZZ_PACKETS=100 MILTER_FUZZ_EXAMPLES=15 \
    python -m pytest --ignore tests/test_stress.py --ignore tests/test_typing.py --ignore tests/test_leaks.py \
    --ignore tests/mta/test_scenarios.py --durations 25 "$@"
build static
check "Python: ruff check" python -m ruff check
check "Python: ruff format --check" python -m ruff format --check
check "Python: mypy" python -m mypy
check "C: ${CC:-cc} -Wall -Wextra -Werror" compile_strictly milter/shim/*.c benchmarks/load/*.c benchmarks/filters/*.c tests/fuzz/bare/*.c
check "Examples in the documentation: doctest" check_documentation
check "Documentation: sphinx-build, warnings are errors" build_site
check "Tests with libmilter's I/O wrapped: pytest" python -m pytest --durations 25 "$@"

# Without arguments for pytest: what is installed, and libmilter as others build it; by scripts of their own.
if [ $# -eq 0 ]; then
    check "The wheel: scripts/wheel.sh" sh scripts/wheel.sh
    check_threads
    check "Workflows: check-jsonschema" python -m check_jsonschema --builtin-schema vendor.github-workflows \
        .github/workflows/*.yml
fi

step "Summing up"
if [ -n "$failed" ]; then
    STEP=$failed
    exit 1
fi
echo "All checks and tests passed."
