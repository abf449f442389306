#!/usr/bin/env bash
# An agent of torchrun, the same command on every host; RANKS ranks each (default: all GPUs).
#
#   NNODES=2 MASTER_ADDR=host-0 launch/torchrun.sh c10d --config configs/NAME.yaml [--section.field=value ...]
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=host-0 launch/torchrun.sh static --config ...
#
# c10d: hosts take their places as they come, and after a fault the agents start all ranks again, RESTARTS times (3);
# with NNODES=1:2 also with the hosts that are left. static: each host has its number, nothing is started again.
set -euo pipefail
usage() {
  echo "launch/torchrun.sh: $1; usage: NNODES=N MASTER_ADDR=HOST launch/torchrun.sh c10d|static [ARGUMENT ...]" >&2
  exit 2
}
way=${1:-}
[[ $way == c10d || $way == static ]] || usage "'$way' is none of c10d, static"
[[ -n ${MASTER_ADDR:-} ]] || usage "MASTER_ADDR is not set"
[[ $way == c10d || ${NODE_RANK:-} =~ ^[0-9]+$ ]] || usage "NODE_RANK (${NODE_RANK:-}) must be the number of this host"
shift
# torch 2.13: agents that share their store with the ranks never come together again after a rank was killed.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
options=(--nnodes "${NNODES:-2}" --nproc-per-node "${RANKS:-gpu}")
if [[ $way == c10d ]]; then
  options+=(--rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29400}" --rdzv-id "${RUN_ID:-moe_train}")
  options+=(--max-restarts "${RESTARTS:-3}")
else
  options+=(--node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29400}")
fi
exec torchrun "${options[@]}" launch/train.py "$@"
