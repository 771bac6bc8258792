#!/usr/bin/env bash
# The GPU tests; if they pass, the benchmarks of both shapes, and a short table last. Run from the repository root on a
# machine with a GPU; about six minutes on an H200. With pytest-xdist installed the tests run side by side, which takes
# a fraction of the time: most of it is the compilation of kernels.
#
#   scripts/gpu_check.sh             tests and benchmarks
#   scripts/gpu_check.sh --quick     tests only
#   scripts/gpu_check.sh --kernels   tests, and every kernel against its floor and PyTorch in place of the benchmarks
#   scripts/gpu_check.sh --sanitize  the tests of attention and matrix products alone, under compute-sanitizer's memcheck
#                                    and racecheck (it must be on the PATH: pip install nvidia-cuda-sanitizer-api, 13.5
#                                    or later; that of CUDA 13.0 takes more of what warps tell each other for hazards)
#
# Other arguments go to pytest; after --sanitize they take the place of those tests' files.
set -uo pipefail

mode=all
case "${1:-}" in
-h | --help)
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    exit
    ;;
--quick | --kernels | --sanitize)
    mode=${1#--}
    shift
    ;;
esac

python3 -c 'import sys, torch, triton
torch.cuda.is_available() or sys.exit("gpu_check.sh: there is no GPU to check on")
print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)' || exit 1
workers=()
if python3 -c 'import xdist' 2>/dev/null; then
    workers=(-n "$(($(nproc) < 12 ? $(nproc) : 12))")
fi
if [ "$mode" = sanitize ]; then
    # Only our kernels are looked at, not PyTorch's, which check them: those would take most of the time. Every tensor is
    # an allocation of its own, so that what reaches past one is seen; that rules out captured graphs.
    select=(-m gpu -k "not captured and not replay and not chain and not large and not opcheck and not torch.float32")
    if [ $# -eq 0 ]; then
        set -- tests/kernels/test_{attention_decode,attention_prefill,attention_prefill_hopper,skinny_linear,linear_hopper,penalties}.py
    fi
    python3 -m pytest "${workers[@]}" "${select[@]}" "$@" || exit 1 # this compiles them
    mapfile -t tests < <(python3 -m pytest --collect-only "${select[@]}" "$@" | grep ::)
    if [ ${#tests[@]} -eq 0 ]; then
        echo "gpu_check.sh: no tests to run under the sanitizer"
        exit 1
    fi
    # racecheck keeps what kernels did in memory until its own threads have looked at it: four processes at once took
    # 67 GiB, eight more than 128 GiB.
    at_once=4
    started=0
    parts=$(((${#tests[@]} + 9) / 10))
    logs=$(mktemp -d)
    check() { # tool, which part of the tests
        local log=$logs/$1-$2 mine=() index passed status
        for ((index = $2; index < ${#tests[@]}; index += parts)); do mine+=("${tests[index]}"); done
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --kernel-name 'regex=^_[a-z_]+_kernel$' \
            --error-exitcode 9 --log-file "$log" python3 -m pytest -p no:xdist -m gpu -rA "${mine[@]}" >"$log.txt" 2>&1
        status=$?
        passed=$(grep -c ^PASSED "$log.txt")
        echo "exit $status: $1, $passed of ${#mine[@]} tests passed, $(grep SUMMARY "$log")"
    }
    echo "${#tests[@]} tests under each tool, in $parts processes, $at_once at once"
    {
        for tool in memcheck racecheck; do
            for ((part = 0; part < parts; part++)); do
                ((started++ < at_once)) || wait -n
                check "$tool" "$part" &
            done
        done
        wait
    } | tee "$logs/results"
    echo "what the tool and the tests said is in $logs"
    ! grep -qv "^exit 0" "$logs/results"
    exit
fi

python3 -m pytest -m "gpu and not alone" -q --durations=5 "${workers[@]}" "$@" && python3 -m pytest -m "gpu and alone" -q
status=$?
echo "gpu tests: exit $status"
if [ "$mode" = quick ] || [ $status -ne 0 ]; then
    exit $status
fi
if [ "$mode" = kernels ]; then
    exec python3 scripts/bench_kernels.py --skip-tests
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
