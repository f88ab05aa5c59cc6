#!/usr/bin/env bash
# compute-sanitizer's memcheck, initcheck and synccheck on every kernel (tests/gpu/sanitized.py: virtual ranks, one GPU).
# Ends with 1 if a tool found something or an output was wrong, with 3 if there is no compute-sanitizer.
#
#   scripts/sanitize.sh [TOOL ...]      PYTHON=python3 chooses the Python that has torch and Collogue's dependencies
#
# Every tensor is an allocation of its own, so that an access beside it is seen; modules are loaded when they are used, so that
# the tool need not instrument all of PyTorch.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
tools=("$@")
[ ${#tools[@]} -gt 0 ] || tools=(memcheck initcheck synccheck)
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer /usr/local/cuda/compute-sanitizer/compute-sanitizer 2>/dev/null | head -n 1)
if [ -z "$sanitizer" ]; then
  echo "there is no compute-sanitizer; it comes with the CUDA toolkit" >&2
  exit 3
fi
export PYTHONPATH="src:tests${PYTHONPATH:+:$PYTHONPATH}" PYTORCH_NO_CUDA_MEMORY_CACHING=1 CUDA_MODULE_LOADING=LAZY

echo "== without a tool"
"$python" -m gpu.sanitized || exit 1
failed=0
for tool in "${tools[@]}"; do
  echo "== $tool"
  start=$SECONDS
  # Errors of API calls are left out: PyTorch asks for functions that a driver may not have.
  timeout --kill-after=5 120 "$sanitizer" --tool "$tool" --error-exitcode 9 --report-api-errors no --print-limit 10 \
    "$python" -m gpu.sanitized
  code=$?
  echo "== $tool ended with $code after $((SECONDS - start)) s"
  [ $code -eq 0 ] || failed=1
done
exit $failed
