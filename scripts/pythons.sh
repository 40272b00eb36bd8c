# SPDX-License-Identifier: GPL-3.0-or-later
# shellcheck shell=sh
# The interpreters at hand. Read by "." after debian.sh; reading it runs nothing.

# Print the path of one interpreter for each supported version of Python: PYTHON first, then what is in PATH, and then
# what pyenv has. One that cannot make a virtual environment or
# compile an extension does not count, nor does a free-threaded one, whose wheels and tests are others.
pythons() {
    seen=
    for candidate in "$PYTHON" $(candidates); do
        version=$(usable_version "$candidate") || continue
        case $seen in *" $version "*) continue ;; esac
        seen="$seen $version "
        command -v "$candidate"
    done
}

candidates() {
    for version in 3.11 3.12 3.13 3.14 3.15; do
        echo "python$version"
        ls -d "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$version"*/bin/python 2>/dev/null || true
    done
}

# Fails where it is not usable.
usable_version() {
    "$1" -c '
import ensurepip, os, sys, sysconfig, venv
print("%d.%d" % sys.version_info[:2])
header = os.path.join(sysconfig.get_path("include"), "Python.h")
sys.exit(sys.version_info < (3, 11) or bool(sysconfig.get_config_var("Py_GIL_DISABLED")) or not os.path.exists(header))
' 2>/dev/null
}
