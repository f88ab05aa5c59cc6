#!/usr/bin/env bash
# Everything that benchmarks/results holds of a machine, on however many GPUs it has: one JSON file for each part.
#
#   benchmarks/run.sh OUT_DIRECTORY [PART ...]
#
# Parts, each a few minutes: check latency suites multiprocessors virtual reliability tune model model-per-token generate serving ablation; default: all, in that order.
# PYTHON=python3 chooses the Python that has collogue, COMMIT what is recorded, WORLDS="3 4" the numbers of ranks of `latency`, `tune` and
# both of `model` (default: theirs). Nothing else may use the GPUs meanwhile. Exits with 1 if anything differed or failed.
set -uo pipefail
out=${1:?usage: benchmarks/run.sh OUT_DIRECTORY [PART ...]}
shift
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(check latency suites multiprocessors virtual reliability tune model model-per-token generate serving ablation)
python=${PYTHON:-python3}
commit=${COMMIT:-$(git -C "$(dirname "$0")" describe --always --dirty)}
mkdir -p "$out"
name=$("$python" -c 'import re, torch; n = torch.cuda.device_count(); g = torch.cuda.get_device_name(0); print(f"{n}x" + re.sub("[^a-z0-9]", "", g.lower().replace("nvidia", "")))')
worlds=()
for world in ${WORLDS:-}; do worlds+=(--world-size "$world"); done
failed=0

collogue() {
  local file=$1
  shift
  echo "== $*"
  "$python" -m collogue "$@" --commit "$commit" --json "$out/$file-$name.json" || failed=1
}

for part in "${parts[@]}"; do
  case $part in
    check) collogue check check --device cuda --sweep full ;;
    latency) collogue latency bench "${worlds[@]}" ;;
    suites) collogue suites bench --suite eager,epilogues,world ;;
    multiprocessors) collogue multiprocessors bench --suite sms --no-chains ;;
    virtual) collogue flashinfer bench --virtual 2,4,8 ;;  # one GPU; with FlashInfer: docs/guides/offline.md
    reliability) collogue reliability reliability ;;
    tune) collogue tune tune "${worlds[@]}" ;;
    model) collogue model bench model "${worlds[@]}" ;;
    model-per-token) collogue model-per-token bench model "${worlds[@]}" --model llama-3.1-8b --scales token ;;
    generate) collogue generate bench generate ;;
    serving) collogue serving bench serving --prompts 240 --layers 16 ;;  # a part of the whole workload
    ablation) collogue ablation ablate --no-facts ;;  # facts need no GPU: ablation-compiled.json
    *) echo "there is no part $part" >&2; exit 2 ;;
  esac
done
exit $failed
