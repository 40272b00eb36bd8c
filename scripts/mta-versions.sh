#!/bin/sh
# SPDX-License-Identifier: GPL-3.0-or-later
# Run the scenarios with the Postfix, the Sendmail and the libmilter of another release of Debian.
#
#   sh scripts/mta-versions.sh trixie [arguments for pytest]
#
# Makes a small system of that release in .mta/RELEASE, with a copy of the project, and runs the tests of tests/mta
# in it. Needs root; of this system it changes nothing, but installs debootstrap where that is missing.

set -eu
CDPATH='' cd -- "$(dirname -- "$0")/.."
. scripts/debian.sh

PACKAGES=ca-certificates,gcc,libc6-dev,libmilter-dev,pkgconf,python3-dev,python3-venv,libsasl2-modules,postfix,openssl,hostname

cleanup() {
    :
}

# Unfinished ones are begun anew.
make_system() {
    if [ -d "$1" ]; then return; fi
    if ! has debootstrap; then as_root apt_install debootstrap; fi
    step "Making a system of $release in $1"
    rm -rf "$1.part"
    mkdir -p "$1.part"
    quietly debootstrap --variant=minbase --include="$PACKAGES" "$release" "$1.part"
    mv "$1.part" "$1"
}

# What this system knows of the network, and the project as it is now.
furnish() {
    for file in /etc/resolv.conf /etc/hosts /etc/pip.conf /etc/apt/apt.conf.d /etc/ssl/certs/ca-certificates.crt "$HOME/.config/pip"; do
        if [ -e "$file" ]; then mkdir -p "$1$(dirname "$file")" && cp -rL "$file" "$1$(dirname "$file")/"; fi
    done
    mkdir -p "$1/milter"
    tar -c --exclude=./.git --exclude='./.venv*' --exclude=./.mta --exclude='*.so' --exclude=./build . | tar -x -C "$1/milter"
}

# In a mount name space of its own, so that nothing stays mounted.
enter() {
    system=$1
    shift
    # shellcheck disable=SC2016
    unshare --mount sh -c '
        system=$1
        shift
        mount -t proc proc "$system/proc" && mount --rbind /dev "$system/dev" && mount -t tmpfs tmp "$system/tmp" -o mode=1777 &&
            exec chroot "$system" "$@"
    ' sh "$system" "$@"
}

inside() {
    step "In $(cat /etc/debian_version): libmilter $(dpkg-query -W -f '${Version}' libmilter-dev), Postfix $(dpkg-query -W -f '${Version}' postfix)"
    unpack_sendmail
    use_venv .venv-mta
    pip_install --editable '.[test]'
    python -m pytest "${@:-tests/mta}"
}

begin
if [ "${1:-}" = --inside ]; then
    shift
    inside "$@"
    exit
fi
if [ "$(id -u)" -ne 0 ]; then die "This needs root."; fi
release=${1:?the name of a release of Debian: trixie}
shift
make_system ".mta/$release"
furnish "$PWD/.mta/$release"
step "Entering .mta/$release"
enter "$PWD/.mta/$release" env HOME=/root CI="${CI:-}" sh /milter/scripts/mta-versions.sh --inside "$@"
