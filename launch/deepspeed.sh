#!/usr/bin/env bash
# deepspeed on the hosts of a hostfile, without `moe-train launch`; from the repository on any host that reaches them.
#
#   launch/deepspeed.sh pdsh HOSTFILE --config configs/NAME.yaml [--section.field=value ...]
#   launch/deepspeed.sh openmpi HOSTFILE --config ...
#   launch/deepspeed.sh no-ssh HOSTFILE --config ...    on every host, with NODE_RANK=0, 1, ... and MASTER_ADDR set
#
# - A hostfile that does not exist is only a warning to deepspeed, which then trains on this machine alone: refused here.
# - pdsh hands on almost none of the environment, and arguments pass through another shell: what has quotes or brackets
#   belongs into the YAML file.
set -euo pipefail
[[ $# -ge 2 && -r $2 ]] || { echo "usage: launch/deepspeed.sh pdsh|openmpi|no-ssh HOSTFILE [ARGUMENT ...]" >&2; exit 2; }
way=$1 hostfile=$2
shift 2

environment=$(mktemp)
trap 'rm -f "$environment"' EXIT
export DS_ENV_FILE=$environment # in place of .deepspeed_env
env | grep -E '^(PATH|LD_LIBRARY_PATH|DS_ACCELERATOR|OMP_NUM_THREADS|[A-Z]+_SOCKET_IFNAME|NCCL_[A-Z_]+)=' >"$environment"

options=(--hostfile "$hostfile" --master_port "${MASTER_PORT:-29500}")
case $way in
  pdsh) ;;
  # deepspeed names eth0 for MPI's own messages: MPI_NETWORK=10.0.0.0/16 names another network.
  openmpi) options+=(--launcher openmpi "--launcher_args=--bind-to none --mca btl_tcp_if_include ${MPI_NETWORK:-eth0}") ;;
  no-ssh) options+=(--no_ssh "--node_rank=$NODE_RANK" --master_addr "$MASTER_ADDR") ;;
  *) echo "launch/deepspeed.sh: $way is none of pdsh, openmpi, no-ssh" >&2; exit 2 ;;
esac
deepspeed "${options[@]}" launch/train.py "$@"
