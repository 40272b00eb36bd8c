#!/bin/sh
# SPDX-License-Identifier: GPL-3.0-or-later
# Run the tests with all supported versions of Python that are at hand, and with each kind of libmilter.
#
#   sh scripts/test-all.sh [arguments for pytest]
#
# Which interpreters that are, scripts/pythons.sh tells; of libmilter's kinds, scripts/libmilter.sh. KINDS names those
# that are wanted [pool thread select]; they are built from Sendmail's source, which SENDMAIL_SOURCE names, or
# which comes from Debian's source package where there is apt-get, or else is fetched.
# EXTRA names the packages that are installed for it: test, or test-core if that is enough for these tests [test].
# Makes .venv-all. It takes long: a quarter of an hour for each Python, on two processors.

set -eu
CDPATH='' cd -- "$(dirname -- "$0")/.."
. scripts/debian.sh
. scripts/pythons.sh

KINDS=${KINDS:-pool thread select}

cleanup() {
    if [ -n "${work:-}" ]; then rm -rf "$work"; fi
}

build_libmilter() {
    step "Building libmilter, the kinds: $KINDS"
    source=${SENDMAIL_SOURCE:-$(debian_source "$work/debian")}
    for kind in $KINDS; do
        # Word by word: nothing, or one.
        # shellcheck disable=SC2086
        quietly env KIND="$kind" sh scripts/libmilter.sh "$work/$kind" $source
    done
}

# Into $1. Each kind is built in a copy, so that the project's directory stays as it is.
copy_project() {
    mkdir "$1"
    tar -cf - --exclude=./.git --exclude='./.*_cache' --exclude='./.venv*' --exclude=./build --exclude='*.so' . |
        tar -xf - -C "$1"
}

# With the interpreter $1, in the copy of the kind $2; the rest is for pytest.
test_one() (
    version=$1
    kind=$2
    shift 2
    VENV=$(CDPATH='' cd -- "$VENV" && pwd)
    cd "$work/project-$kind"
    export PKG_CONFIG_PATH="$work/$kind/lib/pkgconfig" PYTEST_DEBUG_TEMPROOT="$work" MILTER_STRICT=1
    pip_install --editable ".[${EXTRA:-test}]"
    "$VENV/bin/milter" version
    PATH=$VENV/bin:$PATH python -m pytest -q --ignore tests/mta "$@" || {
        echo "Python $version, libmilter of the kind $kind" >>"$work/failed"
    }
)

begin
install_packages miltertest
# The paths of Unix sockets must be short.
work=$(mktemp -d "${TMPDIR:-/tmp}/all.XXXXXX")
build_libmilter
for kind in $KINDS; do copy_project "$work/project-$kind"; done
for python in $(pythons); do
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    PYTHON=$python
    use_venv ".venv-all/$version"
    for kind in $KINDS; do
        step "Testing with Python $version and libmilter of the kind $kind"
        test_one "$version" "$kind" "$@"
    done
done

step "Summing up"
if [ -s "$work/failed" ]; then
    STEP=$(cat "$work/failed")
    exit 1
fi
echo "All tests passed."
