#!/bin/sh
# Whether a GPU computes what the CPU does, and how fast: training, ONNX Runtime's providers, TensorRT engines.
#
#     benchmarks/gpu/run.sh [OUT]
#
# Takes eight minutes at most and no network. It runs with the python3 on the path (or $PYTHON), which needs EdgeFlame
# with its extra `train`; a runtime that is not installed, or does not take this GPU, is named in the table with the
# reason. Writes training.md and runtimes.md into OUT, beside this script by default. Exit code 1 if a part failed, or computes something
# else than the CPU beyond the tolerances that it prints.
set -u
here=$(cd "$(dirname "$0")" && pwd) || exit 1
out=${1:-$here}
python=${PYTHON:-python3}
mkdir -p "$out" && out=$(cd "$out" && pwd) && cd "$here/../.." || exit 1
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu/run.sh: PyTorch finds no GPU here, or is not installed" >&2
    exit 1
fi
nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.mem --format=csv || true

failed=0
run() { # NAME SECONDS SCRIPT...: its output to OUT/NAME.md and to the terminal
    name=$1 seconds=$2
    shift 2
    timeout "$seconds" "$python" "$@" >"$out/$name.md"
    code=$?
    cat "$out/$name.md"
    if [ "$code" -ne 0 ]; then
        echo "gpu/run.sh: $name failed (exit code $code)" >&2
        failed=1
    fi
}
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
run training 200 benchmarks/training/speed.py --device cuda
if "$python" -m edgeflame demo-data --out "$work/boards" && "$python" -m edgeflame fit --data "$work/boards" --out "$work/boards.edgeflame"; then
    run runtimes 240 benchmarks/gpu/runtimes.py --model "$work/boards.edgeflame"
else
    failed=1
fi >&2
exit "$failed"
