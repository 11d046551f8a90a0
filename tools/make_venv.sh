#!/bin/sh
# Makes a virtual environment with chainer_accum in it, to work on this checkout.
# usage: tools/make_venv.sh DIRECTORY PYTHON [PIP_ARGUMENT...]
# The environment variable REQUIREMENTS may name more packages, apart by spaces.
# PYTHON may be empty: then it is python3, if that is a version that is tested, or else the newest one that is.
set -eu

die() {
    echo "make_venv: $*" >&2
    exit 1
}

directory=$1
python=$2
shift 2
cd "$(dirname "$0")/.."

# How the version of an interpreter compares with 3.8 to 3.15, those that the tests are to pass on.
compare() {
    "$1" -c 'import sys; v = sys.version_info; print("older" if v < (3, 8) else "newer" if v >= (3, 16) else "tested")'
}

if [ -z "$python" ]; then
    python=$(python3 -c 'import sys; print(sys.executable)' 2>/dev/null) || python=
    if [ -z "$python" ] || [ "$(compare "$python")" != tested ]; then
        tested=$(tools/pythons.sh | tail -n 1)
        python=${tested:-$python}
    fi
    [ -n "$python" ] || die "found no Python; install one of 3.8 to 3.15, or name it: make PYTHON=/path/to/python test"
fi
case $(compare "$python") in
    tested) ;;
    newer) echo "make_venv: trying $("$python" -V), which is newer than 3.15 and untested" >&2 ;;
    older) die "$("$python" -V) is too old; install one of 3.8 to 3.15, or name it: make PYTHON=/path/to/python test" ;;
    *) die "cannot run PYTHON=$python; name an interpreter that runs" ;;
esac

echo "make_venv: making $directory with $("$python" -V)"
if "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    "$python" -m venv --clear "$directory"
elif command -v virtualenv >/dev/null; then
    virtualenv --quiet --clear --python "$python" "$directory"
else
    die "$python lacks the venv module; install it (on Debian and Ubuntu: apt install python3-venv) or virtualenv"
fi

# Older versions of pip cannot make an editable installation from pyproject.toml.
"$directory/bin/python" -m pip install --disable-pip-version-check --quiet "pip>=21.3"

# Chainer is built from source and needs a setuptools that still has pkg_resources. pip reads the first variable up to
# version 26.1, and the second from 25.3 on.
export PIP_CONSTRAINT="${PIP_CONSTRAINT:+$PIP_CONSTRAINT }build-constraints.txt"
export PIP_BUILD_CONSTRAINT="${PIP_BUILD_CONSTRAINT:+$PIP_BUILD_CONSTRAINT }build-constraints.txt"
"$directory/bin/python" -m pip install --disable-pip-version-check --quiet --editable '.[chainer,test,dev]' "$@"

# One after the other: where mpi4py has no wheel, it is built with the compiler that mpich brings.
for requirement in ${REQUIREMENTS:-}; do
    PATH="$PWD/$directory/bin:$PATH" "$directory/bin/python" -m pip install --disable-pip-version-check --quiet "$requirement"
done
