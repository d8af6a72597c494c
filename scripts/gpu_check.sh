#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, offline, within six minutes: see docs/gpu.md.
#   scripts/gpu_check.sh [--wheels FOLDER] [--models FOLDER] [--output FOLDER] [--work FOLDER] [--only STEPS] [--tune]
# --wheels: packages that this machine lacks. --models: what `scripts/gpu_check.py --prepare FOLDER` wrote elsewhere.
# Exit status: 0 all passed, 1 something failed, 2 nothing could be run here.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

wheels=
rest=()
while [ $# -gt 0 ]; do
  case "$1" in
    --wheels) wheels=${2:?"gpu_check: --wheels needs a folder"}; shift 2 ;;
    *) rest+=("$1"); shift ;;
  esac
done

if ! "$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  echo "gpu_check: torch is missing or finds no CUDA device; nothing was run, GPU figures are not measured" >&2
  exit 2
fi
if [ -n "$wheels" ]; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl
  PYTHONPATH="$PWD:$site:${PYTHONPATH#*:}"
fi
"$python" scripts/gpu_check.py "${rest[@]}"
