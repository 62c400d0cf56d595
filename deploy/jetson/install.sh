#!/bin/sh
# Installs a line on a Jetson with JetPack 6 or 7, beside JetPack's own TensorRT, and builds the engine of a package on
# this very device. NOT YET RUN ON A JETSON: its detection is tested with recorded texts, its steps are those of
# deploy/install.sh, which are.
set -eu

here=$(dirname "$(readlink -f "$0")")
# shellcheck source=deploy/jetson/detect.sh
. "$here/detect.sh"

usage() {
    cat <<'END'
usage: jetson/install.sh [--dry-run] [--model F.edgeflame] [--precision fp32|fp16] [options of deploy/install.sh]

  --model FILE      build this package's engine, into FILE's folder, as the account edgeflame reads it
  --precision P     of the engine  [default: fp16]
  --dry-run         say what would be done

Everything else (--wheelhouse, --package, --python, ...) goes to deploy/install.sh.
END
}

fail() {
    echo "jetson/install.sh: $1" >&2
    exit "${2:-1}"
}

dry=0 model="" precision=fp16 rest=""
while [ $# -gt 0 ]; do
    case $1 in
        --model | --precision) [ $# -ge 2 ] || fail "$1 needs a value; see --help" 2 ;;
    esac
    case $1 in
        --model) model=$2; shift ;;
        --precision) precision=$2; shift ;;
        --dry-run) dry=1 ;;
        -h | --help) usage; exit 0 ;;
        *) rest="$rest $1" ;;
    esac
    shift
done
run() {
    if [ "$dry" = 1 ]; then echo "would run: $*"; else "$@"; fi
}

# Another file in tests.
release_file=${EDGEFLAME_TEGRA_RELEASE:-/etc/nv_tegra_release}
[ -r "$release_file" ] || fail "$release_file is not there: this is no Jetson; take deploy/install.sh"
l4t=$(l4t_release "$(cat "$release_file")")
[ -n "$l4t" ] || fail "$release_file does not say which release of L4T this is"
jetpack=$(jetpack_of "$l4t") || fail "L4T $l4t is neither of JetPack 6 (L4T 36) nor of JetPack 7 (L4T 38): flash one of them"
echo "jetson/install.sh: L4T $l4t, JetPack $jetpack"
[ -z "$model" ] || [ -r "$model" ] || fail "$model: no such file"

# JetPack's TensorRT is seen through the system's packages; a wheel of it would be one for another GPU.
run apt-get install -y --no-install-recommends python3-venv python3-libnvinfer
[ "$dry" = 0 ] || set -- --dry-run
# shellcheck disable=SC2086 # words of a list
"$here/../install.sh" --system-site-packages --with "$(cuda_bindings_of "$jetpack")" --with "onnx>=1.16" "$@" $rest line
if [ "$dry" = 0 ]; then
    /opt/edgeflame/current/bin/python -c 'import tensorrt; print("TensorRT", tensorrt.__version__)' ||
        fail "JetPack's TensorRT is not seen: apt install nvidia-jetpack"
fi
if [ -n "$model" ]; then
    engines=$(dirname "$(readlink -f "$model")")
    # Minutes: every kernel is tried on this GPU, in the power mode that is set now.
    run /opt/edgeflame/edgeflame export --model "$model" --trt --precision "$precision" --out "$engines"
fi
cat <<'END'
jetson/install.sh: before the engine is built, and for good:
  nvpmodel -q               which power mode; `nvpmodel -m 0` is the fastest of most modules (it may restart the machine)
  jetson_clocks             holds the clocks up: latencies stop jumping, the module gets warmer; check `tegrastats`
  an engine belongs to this module, this JetPack and this power mode: after a change of any build it again
END
