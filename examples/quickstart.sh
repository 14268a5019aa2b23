#!/usr/bin/env bash
# Halve the layers of examples/pydocs-gpt2 with calibration, refine them block by block, heal them with the dense model
# as teacher, show the report.
# Uses the environment in .venv if lrsurgery is installed there, else the one on PATH. Writes into the repository's root.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ -x .venv/bin/lrsurgery ]; then
    lrsurgery=.venv/bin/lrsurgery python=.venv/bin/python
elif command -v lrsurgery >/dev/null; then
    lrsurgery=lrsurgery python=$(command -v python >/dev/null && echo python || echo python3)
else
    echo "lrsurgery is not installed; run: python3 -m venv .venv && .venv/bin/pip install ." >&2
    exit 1
fi

step() {
    printf '\n$ %s\n' "$*"
    "$@"
}

step "$python" examples/pydocs_text.py --output pydocs-text
step "$lrsurgery" factorise examples/pydocs-gpt2 --budget 0.5 --calibration pydocs-text/train.txt \
    --refine --refine-steps 100 --output pydocs-gpt2-half --overwrite
step "$lrsurgery" finetune pydocs-gpt2-half --data pydocs-text/train.txt --eval-data examples/pydocs-gpt2/valid.txt \
    --stride 64 --teacher examples/pydocs-gpt2 --steps 300 --eval-steps 150 \
    --output pydocs-gpt2-healed --overwrite
step "$lrsurgery" report pydocs-gpt2-healed
