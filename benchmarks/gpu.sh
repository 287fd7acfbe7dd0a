#!/usr/bin/env bash
# What only a CUDA device can show, as one Markdown file: bash benchmarks/gpu.sh [FILE]
# The gpu-marked tests; a layer of Llama-2-7B's shape: second moments, codes and costs; the packed linear layer against
# hqq's HQQLinear and torch's own. Packages that are missing are installed, if an index can be reached.
set -uo pipefail
cd "$(dirname "$0")/.."
report=${1:-gpu.md}
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
"$python" -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"' || exit 2
for package in hqq pulp termcolor safetensors transformers hypothesis pytest-timeout; do
    "$python" -m pip show --quiet "$package" 2>/dev/null || "$python" -m pip install --quiet --no-deps "$package"
done
section() {  # section TITLE SECONDS COMMAND…: the command's output under a heading, with what became of it
    printf '\n## %s\n\n' "$1"
    timeout "$2" "${@:3}" 2>&1 || printf '\n(ended with status %s)\n' "$?"
}
{
    printf '# On %s\n' "$("$python" -c 'import torch; print(torch.cuda.get_device_name(), "with torch", torch.__version__)')"
    section Tests 90 "$python" -m pytest -m gpu -p no:cacheprovider tests/lmq/quantizers tests/lmq/formats
    section "One layer of Llama-2-7B's shape" 240 "$python" -m benchmarks.large_layer --menu b4g64
    section "The same with six configurations" 240 "$python" -m benchmarks.large_layer --menu b2g64,b3g64,b4g64,b5g64,b6g64,b8g64
    printf '\n## The packed linear layer\n\n```'
    timeout 120 "$python" -m benchmarks.linear --bits 4 --dtypes float16 2>&1
    printf '```\n'
} | tee "$report"
