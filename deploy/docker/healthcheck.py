"""A container's health: whether an address answers 200. Says on standard output what is wrong."""

import sys
import urllib.request

try:
    with urllib.request.urlopen(sys.argv[1], timeout=4) as response:  # noqa: S310 - the image says what
        response.read()
except OSError as exc:
    sys.stdout.write(f"{sys.argv[1]}: {exc}\n")
    sys.exit(1)
