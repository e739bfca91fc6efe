#!/usr/bin/env bash
# One node of several, c10d rendezvous. Start the same command on every node, in any order:
#
#   NODES=2 RANKS_PER_NODE=8 ENDPOINT=gpu-01:29500 examples/torchrun/c10d.sh experiment=NAME run=NAME
#
# ENDPOINT is one of the nodes, and a free port there. The run goes on from its newest checkpoint when
# a process fails (MAX_RESTARTS times; default 3) or when this command is started again: after all
# nodes ended, or on one that was lost (unless it is ENDPOINT's: then on all).
# ENTRY is train (default) or sft, PYTHON by default the checkout's .venv/bin/python.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-.venv/bin/python}
asked=(--rdzv "${ENDPOINT:?HOST:PORT of one of the nodes}")
[ "${NODES:?how many nodes}" -gt 1 ] || asked=(--port "${ENDPOINT##*:}")  # no other has to find it
"$PYTHON" tools/doctor.py "${asked[@]}" >&2
# A restart's processes must meet in a store of their own (megatron_mmr1/launch/rendezvous.py).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
echo "$(hostname): waits for all $NODES nodes, ten minutes at most" >&2
exec "$PYTHON" -m torch.distributed.run \
    --nnodes="$NODES" --nproc-per-node="${RANKS_PER_NODE:?processes a node}" \
    --max-restarts="${MAX_RESTARTS:-3}" \
    --rdzv-backend=c10d --rdzv-endpoint="$ENDPOINT" --rdzv-id="${RUN_ID:-megatron_mmr1}" \
    -m "megatron_mmr1.${ENTRY:-train}" resume=auto "$@"
