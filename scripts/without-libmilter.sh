#!/bin/sh
# SPDX-License-Identifier: GPL-3.0-or-later
# Run a command as if libmilter were not installed: in a mount namespace of its own, its files are hidden.
#
#   sh scripts/without-libmilter.sh COMMAND [ARGUMENT ...]
#
# Needs unshare (util-linux), and root or namespaces for everybody. It ends before the command does anything,
# where libmilter can still be found.

set -eu

# Everything of libmilter where a compiler or a loader looks for it.
libmilter_files() {
    find /usr/include /usr/lib /usr/lib64 /usr/local -name 'libmilter*' ! -type d ! -path '*/share/*' 2>/dev/null || true
    find /usr/include /usr/local/include -type d -name libmilter 2>/dev/null || true
}

hide() {
    if [ -d "$1" ]; then
        mount -t tmpfs -o ro,size=4k none "$1"
    elif [ ! -L "$1" ]; then # a link leads to a hidden file
        mount --bind /dev/null "$1"
    fi
}

if [ "${MILTER_HIDDEN:-}" != "$$" ]; then
    namespace=--mount
    if [ "$(id -u)" -ne 0 ]; then namespace="--mount --map-root-user"; fi
    # The same process goes on in the namespace. Word by word: options.
    # shellcheck disable=SC2086
    MILTER_HIDDEN=$$ exec unshare $namespace sh "$0" "$@"
fi

unset MILTER_HIDDEN
for path in $(libmilter_files); do hide "$path"; done
if "${PYTHON:-python3}" -c 'import ctypes; ctypes.CDLL("libmilter.so.1.0.1")' 2>/dev/null ||
    echo '#include <libmilter/mfapi.h>' | ${CC:-cc} -fsyntax-only -x c - 2>/dev/null; then
    echo "libmilter is still there." >&2
    exit 1
fi
exec "$@"
