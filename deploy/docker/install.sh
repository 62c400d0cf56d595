#!/bin/sh
# Puts EdgeFlame and all that it needs into an image's virtual environment; of the Dockerfiles, from the sources' root.
#   install.sh VENV LOCK '.[EXTRAS]' [REQUIREMENT...]
# LOCK: a file of deploy/locks, whose hashes hold; empty: the newest of everything that fits.
set -eu

venv=$1 lock=$2
shift 2
pip() {
    python=$1/bin/python
    shift
    "$python" -m pip --no-cache-dir --disable-pip-version-check "$@"
}

if [ -z "$lock" ]; then
    pip "$venv" install "$@"
else
    # Only TensorRT-RTX has no wheel where Python's packages are: its source, checked by its hash, fetches one.
    pip "$venv" install --no-deps --only-binary :all: --no-binary tensorrt-rtx --require-hashes -r "deploy/locks/$lock"
    build=$(mktemp -d)
    python3 -m venv "$build"
    pip "$build" install --no-deps --only-binary :all: --require-hashes -r deploy/locks/build.txt
    pip "$build" wheel --no-deps --no-build-isolation --wheel-dir "$build/dist" .
    pip "$venv" install --no-deps --no-index "$build"/dist/edgeflame-*.whl
    rm -r "$build"
    # Nothing is fetched any more; it fails where the lock is not one of these sources.
    extras=${1#.}
    shift
    pip "$venv" --isolated install --no-index "edgeflame$extras" "$@"
fi
# The system's own packages are not ours to judge, where they are seen.
grep -q '^include-system-site-packages = true' "$venv/pyvenv.cfg" || pip "$venv" check
