#!/bin/sh
# SPDX-License-Identifier: GPL-3.0-or-later
# Measure which lines and branches of the library the tests run: of the package, and of the C shim.
#
#   sh scripts/coverage.sh [arguments for pytest]
#
# Measured are the tests' own process, the processes they start, forked workers, and libmilter's threads. Fails if
# less than 95 % of the package's lines and branches were run. Without fuzzing, and tests that only measure time or memory.
#
# Makes .venv-coverage in the project directory; coverage/ there has the report, coverage/html/index.html to read it.
# PYTHON names the interpreter [python3].

set -eu
CDPATH='' cd -- "$(dirname -- "$0")/.."
. scripts/debian.sh

LEAST=95
TESTS="--ignore tests/test_stress.py --ignore tests/test_typing.py
    --ignore tests/test_benchmarks.py --ignore tests/test_leaks.py --ignore tests/test_build.py --ignore tests/fuzz"
# Where no file may grow, the data cannot be written either.
TESTS="$TESTS --deselect tests/miltertest/test_scenarios.py::test_full_disk[limit]"

cleanup() {
    if [ -n "${temporary:-}" ]; then rm -rf "$temporary"; fi
    if [ -n "${measured:-}" ]; then
        # What was built to be measured is slow, and writes files wherever it is used.
        rm -f milter/_shim*.so
        build coverage/build
    fi
}

# Build the extension, its objects in the directory $1.
build() {
    MILTER_STRICT=1 quietly python setup.py -q build_ext --inplace --force --build-temp "$PWD/$1"
}

# Tests start processes as other users, which write their part of the data, too.
make_directories() {
    rm -rf coverage
    mkdir -p coverage/data
    chmod 1777 coverage/data
}

measure() {
    command=$1
    shift
    python -m coverage "$command" --rcfile="$PWD/tests/coverage/coveragerc" "$@"
}

# Lines of the C shim that were run, file by file.
report_shim() {
    find coverage/build-measured -name '*.gcda' -exec gcov --no-output {} + 2>/dev/null |
        awk -F "'" '/^File/ { file = $2 }
            /^Lines executed/ { if (file ~ /^milter.shim.*[.]c$/) { print file ": " $0 }; file = "" }'
}

begin
install_packages miltertest libsasl2-modules
install_postfix
use_venv .venv-coverage
step "Installing what the tests need"
pip_install --editable '.[test]'
# Every process of this environment finds the plugin, whatever its PYTHONPATH: also before coverage.py looks for it.
python -c 'import os, sysconfig
with open(sysconfig.get_path("purelib") + "/a0_milter_tests.pth", "w", encoding="utf-8") as file:
    print(os.path.abspath("tests/coverage"), file=file)'

make_directories
temporary=$(mktemp -d "${TMPDIR:-/tmp}/milter.XXXXXX")
step "Building, to be measured"
measured=yes
(export CFLAGS="${CFLAGS:-} -O1 --coverage -fprofile-update=atomic" LDFLAGS="${LDFLAGS:-} --coverage" &&
    build coverage/build-measured)

export COVERAGE_DATA="$PWD/coverage/data"
export PYTEST_DEBUG_TEMPROOT="$temporary"
PATH=$PWD/$VENV/bin:$PATH

step "Running the tests"
failed=
# Word by word: options.
# shellcheck disable=SC2086
measure run -m pytest $TESTS "$@" || failed=yes

step "Summing up"
measure combine --quiet
measure html --quiet --directory coverage/html
report_shim | tee coverage/shim.txt
measure report --fail-under "$LEAST"
if [ -n "$failed" ]; then die "Tests failed, see above."; fi
