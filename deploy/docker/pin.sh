#!/bin/sh
# Pins the images of the Dockerfiles and of compose.yml: behind each tag, the digest that it has in its registry now. Needs
# the registries, and skopeo or Docker's buildx. Nothing is written unless all are found. `make pin-images` runs it.
set -eu

here=$(dirname "$(readlink -f "$0")")

# digest_of IMAGE: of its manifest, or of the list of manifests of one that is there for several processors.
digest_of() {
    if command -v skopeo >/dev/null; then
        insecure=""
        case $1 in localhost:*) insecure=--tls-verify=false ;; esac # as Docker takes a registry of this machine
        # shellcheck disable=SC2086 # one option or none
        skopeo inspect $insecure --raw "docker://$1" >"$work/manifest" || return 1
        echo "sha256:$(sha256sum "$work/manifest" | cut -d ' ' -f 1)"
    elif docker buildx version >/dev/null 2>&1; then
        docker buildx imagetools inspect --format '{{.Manifest.Digest}}' "$1"
    else
        echo "pin.sh: neither skopeo nor docker buildx is here: apt install skopeo" >&2
        return 1
    fi
}

work=$(mktemp -d)
trap 'rm -r "$work"' EXIT
images=$(sed -n -e 's/^ARG BASE=\([^@]*\).*/\1/p' -e '/image: edgeflame-/d' -e 's/^ *\(image\|BASE\): \([^@]*\).*/\2/p' \
    "$here"/*.Dockerfile "$here/compose.yml" | sort -u)
for image in $images; do
    digest=$(digest_of "$image") || { echo "pin.sh: no digest of $image; nothing was changed" >&2; exit 1; }
    pattern=$(echo "$image" | sed 's/[.]/\\./g')
    printf 's!^\(ARG BASE=\| *image: \| *BASE: \)%s\(@.*\)\{0,1\}$!\\1%s!\n' "$pattern" "$image@$digest" >>"$work/edits"
    echo "$image@$digest"
done
sed -i -f "$work/edits" "$here"/*.Dockerfile "$here/compose.yml"
