#!/usr/bin/env bash
# The GPU tests; if they pass, the benchmarks of both shapes, and a short table last. Run from the repository root on a
# machine with a GPU; about six minutes on an H200. With pytest-xdist installed the tests run side by side, which takes
# a fraction of the time: most of it is the compilation of kernels.
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
workers=()
if python3 -c 'import xdist' 2>/dev/null; then
    workers=(-n "$(($(nproc) < 12 ? $(nproc) : 12))")
fi
# Engines of other tests would take the memory that the start-up tests measure: those run by themselves.
alone=tests/e2e/test_gpu_startup.py
python3 -m pytest -m gpu -q --durations=5 "${workers[@]}" --ignore "$alone" "$@" && python3 -m pytest -m gpu -q "$alone"
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
