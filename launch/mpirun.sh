#!/usr/bin/env bash
# mpirun, Open MPI's or MPICH's, whichever comes first on PATH. Ranks find each other through mpi4py.
#
#   HOSTS=host-0:8,host-1:8 launch/mpirun.sh 16 --config configs/NAME.yaml [--section.field=value ...]
#
# Handed on: the variables that `moe-train launch` hands on, MASTER_ADDR, MASTER_PORT and UCX_*.
# MPIRUN names another mpirun.
# MPICH: export MPI4PY_MPIABI=mpich, and a folder in LD_LIBRARY_PATH with a link libmpi.so.12 to its libmpich.so.12:
# mpi4py's wheel looks for that name. With UCX below it, UCX_TLS=tcp,self keeps it to the network.
set -euo pipefail
usage() {
  echo "launch/mpirun.sh: $1; usage: HOSTS=NAME:SLOTS,... launch/mpirun.sh RANKS [ARGUMENT ...]" >&2
  exit 2
}
[[ ${1:-} =~ ^[1-9][0-9]*$ ]] || usage "RANKS (${1:-}) must be a whole number of at least 1"
[[ -n ${HOSTS:-} ]] || usage "HOSTS is not set"
mpirun=${MPIRUN:-mpirun}
version=$("$mpirun" --version 2>&1) || usage "$mpirun cannot be run: $version"
ranks=$1
shift
if [[ $version == *"Open MPI"* ]]; then
  # Cores are shared out by the trainer; Open MPI would bind each rank to one.
  options=(--host "$HOSTS" -n "$ranks" --bind-to none)
  pattern='^(PATH|VIRTUAL_ENV|LD_LIBRARY_PATH|PYTHONPATH|MPI4PY_MPIABI|DS_ACCELERATOR|OMP_NUM_THREADS'
  pattern+='|MASTER_ADDR|MASTER_PORT|[A-Z]+_SOCKET_IFNAME|NCCL_[A-Z0-9_]+|UCX_[A-Z0-9_]+)$'
  for name in $(compgen -e); do
    if [[ $name =~ $pattern ]]; then options+=(-x "$name"); fi
  done
else
  options=(-hosts "$HOSTS" -n "$ranks") # it hands on the whole environment
fi
exec "$mpirun" "${options[@]}" python launch/train.py "$@"
