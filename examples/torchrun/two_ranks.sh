#!/usr/bin/env bash
# The digits task, data parallel on two processes of this machine. Run the cold start first:
#   make demo      or the first two single commands of examples/digits/README.md
# Usage: examples/torchrun/two_ranks.sh [key=value ...]
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec .venv/bin/torchrun --nproc-per-node 2 -m megatron_mmr1.train run=two_ranks "$@"
