#!/bin/sh
# Prints the interpreters of this machine that the tests are to pass on, one for each version, oldest first.
set -u

for version in 3.8 3.9 3.10 3.11 3.12 3.13 3.14 3.15; do
    for python in "python$version" "$HOME/.pyenv/versions/$version".*/bin/python; do
        # A name on PATH proves nothing: pyenv has one there for each version it holds, which runs only if PYENV_VERSION
        # allows it.
        path=$(PYENV_VERSION=$version "$python" -c 'import sys; print(sys.executable)' 2>/dev/null) || continue
        echo "$path"
        break
    done
done
