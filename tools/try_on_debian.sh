#!/bin/sh
# Runs `make demo` and `make test` on a bare Debian, as a user without root rights, in a path with a space.
# usage: tools/try_on_debian.sh SUITE [PYTHON [DIRECTORY]]
# SUITE is a release of Debian, such as trixie, forky or sid. PYTHON is a package of that release: python3 (the default),
# or one such as python3.15, which then is the only Python there. DIRECTORY (default: build/roots/SUITE) is where the new
# system is made. Nothing is installed in it but make, git, PYTHON and its venv module; above all, no compiler.
#
# Needs root and debootstrap. What is tried is the last commit of this checkout. The commands get the environment
# variables PIP_*, *_proxy and those that name a file of certificates, and these files. MIRROR may name a mirror of Debian.
set -eu

die() {
    echo "try_on_debian: $*" >&2
    exit 1
}

[ $# -ge 1 ] && [ $# -le 3 ] || die "usage: tools/try_on_debian.sh SUITE [PYTHON [DIRECTORY]]"
[ "$(id -u)" = 0 ] || die "only root can make a system; run it with sudo"
command -v debootstrap >/dev/null || die "found no debootstrap; install it (apt install debootstrap)"

# What is mounted and started here goes with this script, whichever way it ends.
if [ -z "${TRY_ON_DEBIAN_ISOLATED:-}" ]; then
    TRY_ON_DEBIAN_ISOLATED=1 exec unshare --mount --pid --fork --kill-child "$0" "$@"
fi

suite=$1
python=${2:-python3}
root=${3:-$(dirname "$0")/../build/roots/$suite}
[ ! -e "$root" ] || die "$root is there already; remove it, or name another directory"
mkdir -p "$root"
root=$(cd "$root" && pwd)
cd "$(dirname "$0")/.."

echo "try_on_debian: making $suite with $python in $root"
script=/usr/share/debootstrap/scripts/$suite
[ -e "$script" ] || script=/usr/share/debootstrap/scripts/sid # a release that is newer than this debootstrap
# A script can be named only after a mirror.
mirror=${MIRROR:-$(sed -n 's/^DEF_MIRROR="\(.*\)"$/\1/p' "$(command -v debootstrap)")}
debootstrap --variant=minbase --include="make,git,$python,$python-venv" "$suite" "$root" "$mirror" "$script" \
    >"$root.log" 2>&1 || die "debootstrap failed; see $root.log"
for compiler in cc gcc clang; do
    ! chroot "$root" sh -c "command -v $compiler" || die "$suite has a compiler, and should have none"
done
chroot "$root" useradd --create-home --shell /bin/sh user
mount -t proc proc "$root/proc"
mkdir -p "$root/dev/shm"
mount -t tmpfs tmpfs "$root/dev/shm"

set -- HOME=/home/user PATH=/usr/bin:/bin LANG=C.UTF-8
for name in $(env | sed -n -E 's/^(PIP_[A-Z_]+|[A-Za-z]+_(proxy|PROXY)|SSL_CERT_FILE|REQUESTS_CA_BUNDLE)=.*/\1/p'); do
    value=$(printenv "$name")
    set -- "$@" "$name=$value"
    case $name in
        *CERT* | *CA_BUNDLE) mkdir -p "$root$(dirname "$value")" && cp "$value" "$root$value" ;;
    esac
done

checkout="home/user/my projects/chainer_accum"
git clone --quiet . "$root/$checkout"
chroot "$root" chown -R user: "/home/user/my projects"

in_root() {
    chroot --userspec=user:user "$root" env -i "$@"
}

status=0
results=
for target in demo test; do
    begin=$(date +%s)
    if in_root "$@" make -C "/$checkout" "$target"; then result=passed; else result=failed status=1; fi
    results="$results, make $target $result after $(($(date +%s) - begin)) s"
done
versions=$(in_root "$@" "/$checkout/.venv/bin/python" -W ignore -c \
    'import platform, numpy; print("Python", platform.python_version() + ", NumPy", numpy.__version__)') || versions=$python
echo "try_on_debian: $suite, $versions$results"
exit $status
