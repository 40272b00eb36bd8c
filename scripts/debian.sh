# SPDX-License-Identifier: GPL-3.0-or-later
# shellcheck shell=sh
# What the scripts share: the system's packages, Python, a virtual environment.
# Read by "." in the project directory; reading it runs nothing.

PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
PYTHON=${PYTHON:-python3}

BY_HAND="\
This system has no apt-get. Install by hand, then run this again:
  Fedora   gcc pkgconf-pkg-config sendmail-milter-devel python3-devel
  Alpine   gcc musl-dev pkgconf libmilter-dev python3-dev coreutils
  FreeBSD  pkgconf python3, and libmilter if the base system is without it"

# ---- What is told

# Say what comes next. When it fails, `on_exit` says it again.
step() {
    STEP=$1
    echo "== $1"
}

die() {
    printf '%s\n' "$@" >&2
    exit 1
}

# Run a command; what it prints is shown only when it fails.
quietly() {
    if ! SAID=$("$@" 2>&1 </dev/null); then
        printf '%s\n' "$SAID" >&2
        return 1
    fi
}

# Every script calls this first. Its function `cleanup` runs at the end in any case.
begin() {
    STEP="starting"
    trap 'on_exit $?' EXIT
    trap 'exit 129' HUP
    trap 'exit 130' INT
    trap 'exit 143' TERM
}

on_exit() {
    trap - EXIT
    cleanup
    if [ "$1" -ne 0 ]; then echo "$0 FAILED: $STEP" >&2; fi
    exit "$1"
}

has() {
    command -v "$1" >/dev/null 2>&1
}

# ---- Packages of the system

# Install those of the packages $@, and of what building needs, that are missing. Without any, it needs no root.
install_packages() {
    if has "$PYTHON"; then check_version; fi
    if has apt-get && has dpkg-query; then
        # Word by word: names of packages.
        # shellcheck disable=SC2046
        set -- $(not_installed ca-certificates gcc libc6-dev libmilter-dev pkgconf "$@") $(python_packages)
        if [ $# -gt 0 ]; then
            step "Installing with apt-get: $*"
            as_root apt_install "$@"
        fi
    fi
    step "Looking for $PYTHON, a C compiler and libmilter"
    if has "$PYTHON"; then check_version; fi
    check_tools
}

# Those of the packages $@ that are not installed.
not_installed() {
    for package; do
        status=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null) || true
        if [ "$status" != installed ]; then echo "$package"; fi
    done
}

# What python3 is without: a part of Debian's, or nothing where python3 is from elsewhere and complete.
python_packages() {
    if [ "$PYTHON" != python3 ]; then return; fi
    if ! has python3; then echo python3; fi
    if ! has_venv; then echo python3-venv; fi
    if ! has_headers; then echo python3-dev; fi
}

# Run a command or a function of this file as root.
as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        quietly "$@"
    elif has sudo; then
        quietly sudo sh -c '. scripts/debian.sh && "$@"' sh "$@"
    else
        die "This needs root, and there is no sudo. Run it once as root; afterwards no root is needed."
    fi
}

apt_install() (
    export DEBIAN_FRONTEND=noninteractive
    # A repository of somebody else's that is out of order need not matter.
    apt-get update -qq || echo "apt-get update failed; trying with the lists that there are"
    apt-get install -qq -y --no-remove --no-install-recommends \
        -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 -o Dpkg::Options::=--force-confold "$@" </dev/null
)

# As root: install Postfix, and neither configure nor start it.
apt_install_postfix() (
    policy=/usr/sbin/policy-rc.d
    if [ ! -e "$policy" ] && [ ! -L "$policy" ]; then
        trap 'rm -f "$policy"' EXIT
        trap 'exit 130' HUP INT TERM
        (umask 022 && printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod 755 "$policy") || return 1
    fi
    # Without debconf's answer the package would set up a mail system for this machine.
    echo 'postfix postfix/main_mailer_type select No configuration' | debconf-set-selections || return 1
    apt_install postfix && [ -x /usr/sbin/postfix ]
)

# Print the directory of Sendmail's source, unpacked in $1, from Debian's or Ubuntu's source package; nothing, if that
# cannot be had. Nothing of the system is changed: apt-get gets its own lists, and the system's places for sources.
debian_source() (
    if ! has apt-get; then return; fi
    mkdir -p "$1/sources" "$1/lists/partial" "$1/cache/archives/partial" "$1/source"
    for list in /etc/apt/sources.list /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources; do
        if [ -e "$list" ]; then
            sed -e 's/^deb /deb-src /' -e 's/^Types:.*/Types: deb-src/' "$list" >"$1/sources/${list##*/}"
        fi
    done
    cd "$1/source" || return
    set -- -qq -o Dir::Etc::sourcelist=- -o Dir::Etc::sourceparts="$1/sources" \
        -o Dir::State::lists="$1/lists" -o Dir::Cache="$1/cache" -o APT::Sandbox::User=root
    # Somebody else's repository may have no sources.
    apt-get "$@" update >/dev/null 2>&1 || true
    if apt-get "$@" source --download-only sendmail >/dev/null 2>&1; then
        mkdir tree && tar -xzf sendmail_*.orig.tar.gz -C tree --strip-components=1 && echo "$PWD/tree"
    fi
)

# Postfix for the tests. Where it cannot be had, says why: its tests are skipped then, and fail under CI.
install_postfix() {
    if [ -x /usr/sbin/postfix ]; then return; fi
    if [ -e /usr/sbin/sendmail ] || [ -L /usr/sbin/sendmail ]; then
        without_postfix "this machine has another mail system (/usr/sbin/sendmail), which is left alone"
    elif ! has apt-get || ! has debconf-set-selections; then
        without_postfix "it is not installed, and this system has no apt-get"
    elif [ "$(id -u)" -ne 0 ] && ! has sudo; then
        without_postfix "it is not installed, and only root could do that"
    else
        step "Installing Postfix with apt-get, neither configured nor started"
        as_root apt_install_postfix
    fi
}

without_postfix() {
    echo "   No tests inside Postfix: $1."
}

# Sendmail for the tests, unpacked below .mta: installed, it would replace Postfix. What it needs of libraries that
# the system has not comes along.
unpack_sendmail() {
    sendmail=.mta/sendmail
    if [ -x $sendmail/usr/libexec/sendmail/sendmail ]; then return; fi
    if ! has apt-get || ! has dpkg; then
        echo "   No tests inside Sendmail: this system has no apt-get."
        return
    fi
    if [ "$(id -u)" -ne 0 ] && ! has sudo; then
        echo "   No tests inside Sendmail: only root can run them."
        return
    fi
    step "Unpacking Sendmail into $sendmail"
    if ! download_sendmail .mta/packages; then
        as_root apt-get update -qq
        quietly download_sendmail .mta/packages
    fi
    for package in .mta/packages/*.deb; do
        dpkg-deb -x "$package" $sendmail.part
    done
    # Its set-group bit is for the machine's own mail.
    chmod g-s $sendmail.part/usr/libexec/sendmail/sendmail
    rm -rf .mta/packages
    mv $sendmail.part $sendmail
}

# Into the directory $1. The packages that would have to go (Postfix) are only named: nothing is installed.
download_sendmail() (
    rm -rf "$1" .mta/sendmail.part
    mkdir -p "$1/partial"
    apt-get install -qq -y --download-only --no-install-recommends -o Debug::NoLocking=1 -o APT::Sandbox::User=root \
        -o Dir::Cache::archives="$PWD/$1" sendmail-bin m4 </dev/null >/dev/null 2>&1
)

# ---- Python and the compiler

check_version() {
    if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        die "$PYTHON is $("$PYTHON" -V 2>&1); 3.11 or newer is needed. Name another one: PYTHON=... sh $0"
    fi
}

check_tools() {
    missing=$(missing_tools)
    if [ -z "$missing" ]; then return; fi
    if ! has apt-get; then missing="$missing
$BY_HAND"; fi
    die "Missing:" "$missing"
}

missing_tools() {
    if ! has "$PYTHON"; then
        echo "  $PYTHON (to name another Python: PYTHON=... sh $0)"
    else
        if ! has_venv; then echo "  the modules venv and ensurepip of $PYTHON"; fi
        if ! has_headers; then echo "  Python.h, the header of $PYTHON for extensions in C"; fi
    fi
    if ! has pkg-config; then echo "  pkg-config"; fi
    if ! compiles >/dev/null 2>&1; then echo "  a C compiler with libmilter/mfapi.h, libmilter's header"; fi
}

has_venv() {
    "$PYTHON" -c 'import ensurepip, venv' >/dev/null 2>&1
}

has_headers() {
    headers=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("include"))' 2>/dev/null) &&
        [ -e "$headers/Python.h" ]
}

compiles() {
    printf '#include <stdbool.h>\n#include <libmilter/mfapi.h>\n' | compile_strictly -x c -
}

# Check C without making anything: the compiler's warnings are errors.
compile_strictly() {
    # Word by word: options.
    # shellcheck disable=SC2046,SC2086
    ${CC:-cc} -std=c11 -Wall -Wextra -Werror -fsyntax-only $(pkg-config --cflags milter 2>/dev/null) "$@"
}

# ---- The virtual environment

# Make the virtual environment $1 unless it is there, of the same Python; `python` is its own from now on.
use_venv() {
    VENV=$1
    step "Making the virtual environment $VENV"
    if [ -e "$VENV" ] && [ ! -w "$VENV" ]; then
        die "$PWD/$VENV belongs to another user (was this run with sudo?). Remove it, and run this again."
    fi
    wanted=$("$PYTHON" -c 'import sys; print(sys.base_prefix, sys.version)')
    found=$("$VENV/bin/python" -c 'import pip, sys; print(sys.base_prefix, sys.version)' 2>/dev/null) || true
    if [ "$found" != "$wanted" ]; then quietly "$PYTHON" -m venv --clear "$VENV"; fi
    # Nothing outside of the project's directory: also no cache, unless somebody says where.
    if [ -z "${PIP_CACHE_DIR:-}" ]; then export PIP_NO_CACHE_DIR=1; fi
    export PIP_DISABLE_PIP_VERSION_CHECK=1
}

python() {
    "$VENV/bin/python" "$@"
}

# Install with pip, the project's build requirements being in the environment already.
# So a second run finds everything, and asks no package index.
pip_install() {
    python -c 'import tomllib
with open("pyproject.toml", "rb") as file:
    print(*tomllib.load(file)["build-system"]["requires"], sep="\n")' >"$VENV/build-requirements.txt"
    quietly python -m pip install -r "$VENV/build-requirements.txt"
    quietly python -m pip install --no-build-isolation "$@"
}

# ---- The documentation

# Make the site from docs/ and the docstrings, in build/site. Warnings are errors.
build_site() {
    python -m sphinx -q -E -W --keep-going -b html docs build/site
}
