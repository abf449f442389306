#!/usr/bin/env bash
# mpirun, Open MPI's or MPICH's, whichever comes first on PATH. Ranks find each other through mpi4py.
#
#   HOSTS=host-0:8,host-1:8 launch/mpirun.sh 16 --config configs/NAME.yaml [--section.field=value ...]
#
# MPICH: export MPI4PY_MPIABI=mpich, and a folder in LD_LIBRARY_PATH with a link libmpi.so.12 to its libmpich.so.12:
# mpi4py's wheel looks for that name. With UCX below it, UCX_TLS=tcp,self keeps it to the network.
set -euo pipefail
[[ $# -ge 1 && $1 =~ ^[0-9]+$ ]] || { echo "usage: HOSTS=NAME:SLOTS,... launch/mpirun.sh RANKS [ARGUMENT ...]" >&2; exit 2; }
ranks=$1
shift
names=(PATH)
for name in LD_LIBRARY_PATH MPI4PY_MPIABI DS_ACCELERATOR OMP_NUM_THREADS UCX_TLS GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME; do
  if [[ -n ${!name+set} ]]; then names+=("$name"); fi
done
if mpirun --version 2>&1 | grep -q 'Open MPI'; then
  # Cores are shared out by the trainer; Open MPI would bind each rank to one.
  options=(--host "$HOSTS" -n "$ranks" --bind-to none)
  for name in "${names[@]}"; do options+=(-x "$name"); done
else
  options=(-hosts "$HOSTS" -n "$ranks") # it hands on the whole environment
fi
exec mpirun "${options[@]}" python launch/train.py "$@"
