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
HEADS="12 9" SGLANG=1 scripts/setup_engines.sh
for kind in qwen3 gemma3; do
    [[ -d $folder/$kind ]] || "$folder/bin/python" scripts/tiny_folder.py "$kind" "$folder/$kind" "$folder/smollm2-12-heads"
done
out=benchmarks/engines
mkdir -p "$out"
commit=$(git rev-parse --short=12 HEAD)
run() { # name, model, ranks, fused calls of a forward pass, what else
    echo "== $1"
    "$folder/bin/python" scripts/run_vllm.py "$folder/$2" --world "$3" --fused-a-forward "$4" --commit "$commit" --json "$out/$1.json" \
        "${@:5}" 2>"$folder/$1.log"
}
run vllm-eager-2 smollm2-12-heads 2 61 --switch auto
run vllm-eager-3 smollm2-9-heads 3 61 --switch eager
run vllm-compiled-2 smollm2-12-heads 2 61 --switch auto --compiled
run vllm-compiled-3 smollm2-9-heads 3 61 --switch compile --compiled
# Attention's 30 sums are read by something else: vLLM's own all-reduce takes them.
run vllm-eager-read-between smollm2-12-heads 2 31 --switch eager --read-between
run vllm-eager-qwen3 qwen3 2 7 --switch eager
run vllm-compiled-qwen3 qwen3 2 7 --switch auto --compiled
# Gemma multiplies its embedding before the first norm, so that sum is read: 6 of 7.
run vllm-eager-gemma3 gemma3 2 6 --switch eager
run vllm-compiled-gemma3 gemma3 2 6 --switch auto --compiled
script() { # name, script, what it is given
    echo "== $1"
    "$folder/bin/python" "scripts/$2" "${@:3}" --commit "$commit" --json "$out/$1.json" 2>"$folder/$1.log"
}
script vllm-stream stream_vllm.py "$folder/smollm2-12-heads"
script vllm-leak stream_vllm.py "$folder/qwen3" --steps 2000
script vllm-faults faults_vllm.py "$folder/qwen3"
PYTHONPATH=$folder/sglang script sglang-layers run_sglang.py
echo "== vllm-serve"
"$folder/bin/python" scripts/serve_vllm.py "$folder/smollm2-12-heads" --prompts 60 --input 16 --output 8 --bound 1e-5 \
    --commit "$commit" --json "$out/vllm-serve.json" -- --dtype float32 --enforce-eager --max-model-len 256
