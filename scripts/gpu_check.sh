#!/usr/bin/env bash
# The GPU tests; if they pass, the benchmarks of both shapes, and a short table last. Run from the repository root on a
# machine with a GPU; about five minutes on an H200.
#
#   scripts/gpu_check.sh            tests and benchmarks
#   scripts/gpu_check.sh --quick    tests only
#
# Other arguments go to pytest.
set -uo pipefail

quick=
if [ "${1:-}" = --quick ]; then
    quick=1
    shift
fi

python3 -c 'import torch, triton; print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)'
python3 -m pytest -m gpu -x --durations=5 "$@"
status=$?
echo "gpu tests: exit $status"
if [ -n "$quick" ] || [ $status -ne 0 ]; then
    exit $status
fi

reports=$(mktemp)
trap 'rm -f "$reports"' EXIT
for model in llama-3.1-8b qwen3-0.6b; do
    if ! python3 -m mini_infer bench latency bench-256 prefill-64x2048 --model "$model" | tee -a "$reports"; then
        echo "benchmarks of $model failed"
        status=1
    fi
done
echo
python3 scripts/bench_summary.py <"$reports"
exit $status
