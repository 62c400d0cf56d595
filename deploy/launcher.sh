#!/bin/sh
# Runs the release that is current now. By its own path, not through the link: a service that runs for months must
# not import half of itself from a release that was installed meanwhile.
set -eu
here=$(dirname "$(readlink -f "$0")")
# Isolated: neither the working directory nor the caller's PYTHON* variables choose what is imported.
exec "$(readlink -f "$here/current")/bin/python" -I -m edgeflame "$@"
