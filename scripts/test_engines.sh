#!/usr/bin/env bash
# Run a real vLLM on CPU ranks with and without Collogue and compare (scripts/run_vllm.py).
#
#   scripts/test_engines.sh short   one case, two ranks: what .ci/run does
#   scripts/test_engines.sh         all cases; writes benchmarks/engines/*.json
set -euo pipefail
cd "$(dirname "$0")/.."

folder=${ENGINES:-${XDG_CACHE_HOME:-$HOME/.cache}/collogue-engines}
if [[ ${1:-} == short ]]; then
    code=0
    scripts/setup_engines.sh || code=$?
    [[ $code == 3 ]] && exit 0
    [[ $code == 0 ]] || exit "$code"
    exec "$folder/bin/python" scripts/run_vllm.py "$folder/smollm2-12-heads" --tokens 4 --fused-a-forward 61 2>"$folder/run.log"
fi
HEADS="12 9" scripts/setup_engines.sh
out=benchmarks/engines
mkdir -p "$out"
commit=$(git rev-parse --short=12 HEAD)
run() { # name, ranks, heads, what else
    echo "== $1"
    "$folder/bin/python" scripts/run_vllm.py "$folder/smollm2-$3-heads" --world "$2" --fused-a-forward 61 --commit "$commit" --json "$out/$1.json" "${@:4}" 2>"$folder/$1.log"
}
run vllm-eager-2 2 12 --switch eager
run vllm-eager-3 3 9 --switch auto
run vllm-compiled-2 2 12 --switch auto --compiled
run vllm-compiled-3 3 9 --switch compile --compiled
