#!/usr/bin/env bash
# The GPU tests, and a short table last. Run from the repository root on a machine with a GPU.
set -uo pipefail
python3 -c 'import torch, triton; print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)'
python3 -m pytest -m gpu -x --durations=5 "$@"
status=$?
echo "gpu tests: exit $status"
exit $status
