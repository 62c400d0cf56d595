#!/bin/sh
# Gathers all that install.sh needs on a machine without internet; run it where there is one, with the same Python
# version and processor as the target (or say which, see below), then carry the folder over.
set -eu

here=$(dirname "$(readlink -f "$0")")
# shellcheck source=deploy/roles.sh
. "$here/roles.sh"

usage() {
    cat <<'END'
usage: wheelhouse.sh --out DIR [--gpu] [--package SPEC] [--python PYTHON] ROLE... [-- PIP OPTIONS]

  ROLE             aggregator, site or line; several for a machine that is several
  --out DIR        where the wheels go
  --gpu            models run on an NVIDIA GPU (onnxruntime-gpu)
  --package SPEC   what is installed: edgeflame==X.Y.Z, or a wheel; by default built from the checkout this script is in
  --python PYTHON  which Python gathers them  [default: python3]

For a target of another kind: wheelhouse.sh --out DIR line -- --only-binary :all: --platform manylinux_2_28_aarch64 \
                              --platform manylinux2014_aarch64 --python-version 3.10
END
}

fail() {
    echo "wheelhouse.sh: $1" >&2
    exit "${2:-1}"
}

out="" runtime=cpu package="" python=python3 roles=""
while [ $# -gt 0 ]; do
    case $1 in
        --out | --package | --python) [ $# -ge 2 ] || fail "$1 needs a value; see --help" 2 ;;
    esac
    case $1 in
        --out) out=$2; shift ;;
        --gpu) runtime=gpu ;;
        --package) package=$2; shift ;;
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
if [ -z "$package" ]; then
    # From a copy: a build leaves traces beside its sources.
    build=$(mktemp -d)
    trap 'rm -rf "$build"' EXIT
    for part in edgeflame boards cli fitting fleet trainer aggregator export edge pyproject.toml README.md LICENSE; do
        cp -r "$here/../$part" "$build/"
    done
    "$python" -m pip wheel --quiet --no-deps --wheel-dir "$build/dist" "$build"
    rm -f "$out"/edgeflame-*.whl
    cp "$build"/dist/edgeflame-*.whl "$out/"
    package=$(ls "$out"/edgeflame-*.whl)
fi
"$python" -m pip download --quiet --prefer-binary --dest "$out" "$@" "${package}[$extras]"
# Sources would need a compiler on the target.
find "$out" -maxdepth 1 -name '*.tar.gz' | while read -r source; do
    "$python" -m pip wheel --quiet --no-deps --wheel-dir "$out" "$source"
    rm "$source"
done
(cd "$out" && sha256sum -- *.whl >SHA256SUMS)
echo "$(find "$out" -name '*.whl' | wc -l) wheels, $(du -sh "$out" | cut -f1), in $out"
echo "on the target: deploy/install.sh --wheelhouse $(basename "$out")$roles"
