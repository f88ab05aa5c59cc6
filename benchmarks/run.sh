#!/usr/bin/env bash
# On however many GPUs a machine has: the bitwise sweep, the latencies, soak, faults and the cost of the protection. docs/evidence.md names
# the commands of the other results.
#
#   benchmarks/run.sh OUT_DIRECTORY [COMMIT]      PYTHON=python3 chooses the Python that has collogue
#
# Takes minutes, most of them compiling and checking. Exits with 1 if anything differed or failed.
set -uo pipefail
out=${1:?usage: benchmarks/run.sh OUT_DIRECTORY [COMMIT]}
commit=${2:-$(git -C "$(dirname "$0")" describe --always --dirty)}
python=${PYTHON:-python3}
mkdir -p "$out"
name=$("$python" -c 'import re, torch; n = torch.cuda.device_count(); g = torch.cuda.get_device_name(0); print(f"{n}x" + re.sub("[^a-z0-9]", "", g.lower().replace("nvidia", "")))')
failed=0
"$python" -m collogue.cli check --device cuda --sweep full --commit "$commit" --json "$out/check-$name.json" || failed=1
"$python" -m collogue.cli bench --commit "$commit" --json "$out/latency-$name.json" || failed=1
"$python" -m collogue.cli reliability --commit "$commit" --json "$out/reliability-$name.json" || failed=1
exit $failed
