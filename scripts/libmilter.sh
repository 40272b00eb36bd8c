#!/bin/sh
# SPDX-License-Identifier: GPL-3.0-or-later
# Build libmilter from Sendmail's source, as it was released, into a directory of its own: for the wheels, which
# carry it, and for the tests with the other kinds of libmilter.
#
#   sh scripts/libmilter.sh DIRECTORY [SOURCE]
#
# SOURCE is a directory with Sendmail's source, or the archive of the release that scripts/libmilter.release names.
# Without it, that archive is fetched. KIND says how libmilter serves its connections:
#
#   KIND=pool    by a pool of workers, as Debian builds it [this]
#   KIND=thread  by a thread for each of them, and without IPv6
#   KIND=select  by a thread for each of them, and it waits with select
#
# Sendmail's own build makes threads, select, and no IPv6. With select, libmilter is not linked statically, and the
# library cannot make up for IPv6; so that is missing where it can.
#
# Makes DIRECTORY/include/libmilter and DIRECTORY/lib with libmilter.a (of position-independent code), libmilter.so
# and pkgconfig/milter.pc; and DIRECTORY/share with the archive, if it was one. With
# PKG_CONFIG_PATH=DIRECTORY/lib/pkgconfig the project is built with it.
# CC, AR and CFLAGS name the compiler, the archiver and the compiler's options.

set -eu

USAGE="Usage: [KIND=pool|thread|select] sh $0 DIRECTORY [SOURCE]"
SCRIPTS=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
# shellcheck source=scripts/libmilter.release
. "$SCRIPTS/libmilter.release"

LIBRARY="main engine listener worker handler comm smfi signal sm_gethost monitor" # libmilter/
COMMON="errstring strl"                                                          # libsm/
CFLAGS=${CFLAGS:--O2 -fstack-protector-strong -D_FORTIFY_SOURCE=2}

die() {
    printf '%s\n' "$@" >&2
    exit 1
}

# ---- The source

# Print the directory of the source: $1, or $1 unpacked, or what is fetched.
source_tree() {
    if [ -d "${1:-}" ]; then
        echo "$1"
        return
    fi
    archive=${1:-$work/sendmail.tar.gz}
    if [ $# -eq 0 ]; then fetch "$archive"; fi
    check_sum "$archive"
    mkdir "$work/source"
    tar -xzf "$archive" -C "$work/source" --strip-components=1
    mkdir -p "$prefix/share"
    cp "$archive" "$prefix/share/sendmail.$SENDMAIL_VERSION.tar.gz"
    echo "$work/source"
}

fetch() {
    for place in $SENDMAIL_PLACES; do
        if curl --fail --silent --location --retry 3 --output "$1" "$place/sendmail.$SENDMAIL_VERSION.tar.gz"; then
            return
        fi
    done
    die "Sendmail's release $SENDMAIL_VERSION cannot be fetched from $SENDMAIL_PLACES." \
        "Get its archive from elsewhere, and name it: sh $0 DIRECTORY SOURCE"
}

check_sum() {
    if [ ! -e "$1" ]; then die "$1 is missing." "$USAGE"; fi
    if ! echo "$SENDMAIL_SHA256  $1" | sha256sum -c >/dev/null 2>&1; then
        die "$1 is not the archive of Sendmail's release $SENDMAIL_VERSION: its SHA-256 is another one." \
            "Is another release wanted, change scripts/libmilter.release, or name an unpacked source."
    fi
}

# Whoever carries libmilter must carry its licence; ours is a copy.
check_licence() {
    if ! cmp -s "$source/LICENSE" "$SCRIPTS/../licenses/libmilter.txt"; then
        die "$source/LICENSE is not licenses/libmilter.txt: read it, and put it there."
    fi
}

# ---- Compiling

# Print the options of the kind $1.
options_of() {
    case $1 in
    pool) echo "-DSM_CONF_POLL=1 -D_FFR_WORKERS_POOL=1 -DNETINET6=1" ;;
    thread) echo "-DSM_CONF_POLL=1 -DNETINET6=0" ;;
    select) echo "-DSM_CONF_POLL=0 -DNETINET6=1" ;;
    *) die "KIND=$1 is unknown." "$USAGE" ;;
    esac
}

# The source has parameters in the style before C89, which C23 has given up.
compile() {
    # Word by word: options.
    # shellcheck disable=SC2086
    ${CC:-cc} -std=gnu17 -w -Werror=implicit-function-declaration $CFLAGS -fPIC -pthread $options \
        -DNOT_SENDMAIL -Dsm_snprintf=snprintf -DNEEDSGETIPNODE=1 -DHAS_GETHOSTBYNAME2=1 -DHASSTRERROR=1 \
        -DSOCKADDR_LEN_T=socklen_t -DSOCKOPT_LEN_T=socklen_t \
        -I"$work" -I"$source/include" -I"$source/sendmail" -I"$source/libmilter" -c "$1" -o "$2"
}

# Two headers in the place of Sendmail's and the kernel's own: those want the kernel's headers to be installed, and
# a file that only glibc has. What they say beyond this, libmilter does not use.
headers() {
    mkdir "$work/linux"
    echo '#define LINUX_VERSION_CODE KERNEL_VERSION(3, 0, 0)' >"$work/linux/version.h"
    printf '#define SM_OS_NAME "linux"\n#define SM_CONF_SYS_CDEFS_H 0\n' >"$work/sm_os.h"
}

compile_all() {
    headers
    for name in $LIBRARY; do compile "$source/libmilter/$name.c" "$work/$name.o"; done
    for name in $COMMON; do compile "$source/libsm/$name.c" "$work/$name.o"; done
}

install_all() {
    mkdir -p "$prefix/include/libmilter" "$prefix/lib/pkgconfig"
    cp "$source/include/libmilter/mfapi.h" "$source/include/libmilter/mfdef.h" "$prefix/include/libmilter"
    rm -f "$prefix/lib/libmilter.a"
    # Word by word: a command may have options.
    # shellcheck disable=SC2086
    ${AR:-ar} rc "$prefix/lib/libmilter.a" "$work"/*.o
    # shellcheck disable=SC2086
    ${CC:-cc} -shared -pthread -Wl,-z,defs -Wl,-soname,libmilter.so "$work"/*.o -o "$prefix/lib/libmilter.so"
    cat >"$prefix/lib/pkgconfig/milter.pc" <<END
Name: milter
Description: Sendmail's library for mail filters
Version: $SENDMAIL_VERSION
Libs: -L$prefix/lib -Wl,-rpath,$prefix/lib -lmilter
Cflags: -I$prefix/include
END
}

if [ $# -lt 1 ] || [ $# -gt 2 ]; then die "$USAGE"; fi
KIND=${KIND:-pool}
options=$(options_of "$KIND")
work=$(mktemp -d "${TMPDIR:-/tmp}/libmilter.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 130' HUP INT TERM
mkdir -p "$1"
prefix=$(CDPATH='' cd -- "$1" && pwd)
shift
source=$(source_tree "$@")
check_licence
compile_all
install_all
echo "libmilter ($KIND) lies in $prefix"
