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
usage() {
  echo "launch/deepspeed.sh: $1; usage: launch/deepspeed.sh pdsh|openmpi|no-ssh HOSTFILE [ARGUMENT ...]" >&2
  exit 2
}
way=${1:-} hostfile=${2:-}
[[ $way =~ ^(pdsh|openmpi|no-ssh)$ ]] || usage "'$way' is none of pdsh, openmpi, no-ssh"
[[ -f $hostfile && -r $hostfile ]] || usage "HOSTFILE ($hostfile) cannot be read"
shift 2

options=(--hostfile "$hostfile" --master_port "${MASTER_PORT:-29500}")
if [[ $way == no-ssh ]]; then
  [[ ${NODE_RANK:-} =~ ^[0-9]+$ ]] || usage "NODE_RANK (${NODE_RANK:-}) must be the number of this host"
  [[ -n ${MASTER_ADDR:-} ]] || usage "MASTER_ADDR is not set"
  exec deepspeed "${options[@]}" --no_ssh "--node_rank=$NODE_RANK" --master_addr "$MASTER_ADDR" launch/train.py "$@"
fi

if [[ -n ${MASTER_ADDR:-} ]]; then options+=(--master_addr "$MASTER_ADDR"); fi
# deepspeed names eth0 for MPI's own messages: MPI_NETWORK=10.0.0.0/16 names another network.
if [[ $way == openmpi ]]; then
  options+=(--launcher openmpi "--launcher_args=--bind-to none --mca btl_tcp_if_include ${MPI_NETWORK:-eth0}")
fi
names='PATH|VIRTUAL_ENV|LD_LIBRARY_PATH|PYTHONPATH|MPI4PY_MPIABI|DS_ACCELERATOR|OMP_NUM_THREADS|[A-Z]+_SOCKET_IFNAME'
# In place of .deepspeed_env. Its name is gone at once, so that nothing is left behind; exec keeps what is open.
file=$(mktemp)
exec 9>"$file"
DS_ENV_FILE=/proc/$$/fd/9
export DS_ENV_FILE
rm "$file"
env | grep -E "^($names|NCCL_[A-Z0-9_]+)=" >&9
exec deepspeed "${options[@]}" launch/train.py "$@"
