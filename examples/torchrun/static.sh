#!/usr/bin/env bash
# One node of several, static rendezvous: every node is told which one it is, from 0 on.
#
#   NODES=2 NODE=0 RANKS_PER_NODE=8 ENDPOINT=gpu-01:29500 \
#       examples/torchrun/static.sh experiment=NAME run=NAME [key=value ...]
#
# ENDPOINT is node 0, and a free port there. When a process fails all nodes end; start the same
# commands again, and the run goes on from its newest checkpoint.
# ENTRY is train (default) or sft, PYTHON by default the checkout's .venv/bin/python.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-.venv/bin/python}
asked=(--rdzv "${ENDPOINT:?HOST:PORT of node 0}")
[ "${NODES:?how many nodes}" -gt 1 ] || asked=(--port "${ENDPOINT##*:}")  # no other has to find it
"$PYTHON" tools/doctor.py "${asked[@]}" >&2
echo "$(hostname): waits for all $NODES nodes, fifteen minutes at most" >&2
exec "$PYTHON" -m torch.distributed.run \
    --nnodes="$NODES" --node-rank="${NODE:?which of them this is}" \
    --nproc-per-node="${RANKS_PER_NODE:?processes a node}" \
    --master-addr="${ENDPOINT%:*}" --master-port="${ENDPOINT##*:}" \
    -m "megatron_mmr1.${ENTRY:-train}" resume=auto "$@"
