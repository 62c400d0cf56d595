#!/bin/sh
# Gathers all that install.sh needs on a machine without internet; run it where there is one, with the same Python
# version and processor as the target (or say which, see below), then carry the folder over.
set -eu

here=$(dirname "$(readlink -f "$0")")
# shellcheck source=deploy/roles.sh
. "$here/roles.sh"

usage() {
    cat <<'END'
usage: wheelhouse.sh --out DIR [--gpu] [--package SPEC] [--with REQUIREMENT]
                     [--unlocked] [--python PYTHON] ROLE... [-- PIP OPTIONS]

  ROLE             aggregator, site or line; several for a machine that is several
  --out DIR        where the wheels go
  --gpu            models run on an NVIDIA GPU (onnxruntime-gpu)
  --package SPEC   what is installed: edgeflame==X.Y.Z, or a wheel; by default built from the checkout this script is in
  --with REQUIREMENT  a package more that the machine needs, with what it needs; may be given again
  --unlocked       the newest of everything that fits, in place of what deploy/locks names with its hashes
  --python PYTHON  which Python gathers them  [default: python3]

For a target of another kind: wheelhouse.sh --out DIR line -- --only-binary :all: --platform manylinux_2_28_aarch64 \
                              --platform manylinux2014_aarch64 --python-version 3.10
END
}

fail() {
    echo "wheelhouse.sh: $1" >&2
    exit "${2:-1}"
}

out="" runtime=cpu package="" more="" locked=1 python=python3 roles=""
while [ $# -gt 0 ]; do
    case $1 in
        --out | --package | --with | --python) [ $# -ge 2 ] || fail "$1 needs a value; see --help" 2 ;;
    esac
    case $1 in
        --out) out=$2; shift ;;
        --gpu) runtime=gpu ;;
        --package) package=$2; shift ;;
        --with) more="$more $2"; shift ;;
        --unlocked) locked=0 ;;
        --python) python=$2; shift ;;
        -h | --help) usage; exit 0 ;;
        --) shift; break ;;
        -*) fail "unknown option $1; see --help" 2 ;;
        *) roles="$roles $1" ;;
    esac
    shift
done
[ -n "$out" ] || fail "--out DIR is missing; see --help" 2
[ -n "$roles" ] || fail "no role given: aggregator, site or line" 2
# shellcheck disable=SC2086 # words of a list
extras=$(join_extras "$runtime" $roles) || exit 2

mkdir -p "$out"
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
if [ -z "$package" ]; then
    # From a copy: a build leaves traces beside its sources.
    for part in edgeflame boards cli fitting fleet trainer aggregator export edge pyproject.toml README.md LICENSE; do
        cp -r "$here/../$part" "$build/"
    done
    "$python" -m pip wheel --quiet --no-deps --wheel-dir "$build/dist" "$build"
    rm -f "$out"/edgeflame-*.whl
    cp "$build"/dist/edgeflame-*.whl "$out/"
    package=$(ls "$out"/edgeflame-*.whl)
fi
rm -rf "$out/locks"
sums='*.whl'
if [ "$locked" = 1 ]; then
    sums='*.whl locks/*.txt'
    mkdir "$out/locks"
    for role in $roles; do
        lock=$(lock_of "$role" "$runtime")
        "$python" "$here/lock_for.py" "$here/locks/$lock" "$@" >>"$build/locked.txt"
        # install.sh installs by it.
        cp "$here/locks/$lock" "$out/locks/"
    done
    # Wheels alone: nothing of anybody's is run to gather them.
    "$python" -m pip download --quiet --no-deps --only-binary :all: --require-hashes --dest "$out" \
        -r "$build/locked.txt" "$@"
    "$python" -m pip download --quiet --no-deps --dest "$out" "$@" "$package"
else
    "$python" -m pip download --quiet --prefer-binary --dest "$out" "$@" "${package}[$extras]"
fi
if [ -n "$more" ]; then
    touch "$build/locked.txt"
    sed 's/ --hash=.*//' "$build/locked.txt" >"$build/versions.txt"
    # shellcheck disable=SC2086 # words of a list
    "$python" -m pip download --quiet --prefer-binary --find-links "$out" --dest "$out" \
        -c "$build/versions.txt" "$@" $more
fi
# Sources would need a compiler on the target.
find "$out" -maxdepth 1 -name '*.tar.gz' | while read -r source; do
    "$python" -m pip wheel --quiet --no-deps --wheel-dir "$out" "$source"
    rm "$source"
done
# shellcheck disable=SC2086 # patterns
(cd "$out" && sha256sum -- $sums >SHA256SUMS)
echo "$(find "$out" -name '*.whl' | wc -l) wheels, $(du -sh "$out" | cut -f1), in $out"
echo "on the target: deploy/install.sh --wheelhouse $(basename "$out")$roles"
