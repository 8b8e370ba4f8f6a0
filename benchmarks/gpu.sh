#!/usr/bin/env bash
# What the core and the plugins of docs/results/gpu.md cost on one GPU, in one json: under 8 minutes on an H100.
#
#     benchmarks/gpu.sh OUTPUT.json                # one GPU; the models are as large as its memory allows
#     benchmarks/gpu.sh OUTPUT.json --size tiny    # on a CPU, to try the script; the figures mean nothing
#
# PYTHON names the interpreter (default: python). A part that fails, or takes longer than its share of the 8 minutes,
# is named in the json and in the exit status, and the others go on.

set -u
here=$(cd "$(dirname "$0")" && pwd)
output=${1:?"usage: benchmarks/gpu.sh OUTPUT.json [--size tiny]"}
python=${PYTHON:-python}
parts=$(mktemp -d)
trap 'rm -rf "$parts"' EXIT

how=(--device cuda) limit=1
if [ "${2:-}" = --size ] && [ "${3:-}" = tiny ]; then
    how=(--device cpu --size tiny --steps 4) limit=6  # times the share, on a CPU that does other things too
elif [ $# -gt 1 ]; then
    echo "usage: benchmarks/gpu.sh OUTPUT.json [--size tiny]" >&2
    exit 2
fi

# part SECONDS NAME [OPTION...]: one benchmark.
part() {
    local seconds=$1 name=$2
    shift 2
    echo "== $name"
    timeout $((seconds * limit)) "$python" "$here/$name.py" "$@" "${how[@]}" --json "$parts/$name.json" ||
        echo "ended with status $?" >"$parts/$name.failed"
}

part 80 core --steps 10 --layer-steps 60 --only "no plugins" power compute_loss_func
part 135 objectives --steps 10 --only "plain nll, again" nll power dft threshold \
    "iw-sft, cached" "iw-sft, start" "asft, start"
part 75 averaging --steps 8 --only "+ ema" "+ ema, device: cpu"
part 95 data_regularization --steps 10 --only "two streams" "layer-wise one pass" "layer-wise sketched" half-space
part 90 mixing --steps 8

"$python" "$here/joined.py" "$output" "$parts"
