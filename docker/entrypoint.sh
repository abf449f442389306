#!/usr/bin/env bash
# The first word of `docker run IMAGE WORD ...` is what runs, in the place of this script: signals reach it.
#
#   deepspeed | torchrun | mpirun | mpiexec     a launcher, as in deepspeed --num_gpus 2 launch/train.py --config ...
#   keep_running.sh                             launch/keep_running.sh -- LAUNCHER ...: starts a failed training again
#   moe-train | python | make | bash            a command, the interpreter, make test, a shell
#   sshd                                        makes this container a host that launchers of other containers reach
#   help                                        this text
#
# sshd needs no privilege: it listens on SSH_PORT (2222) and lets in whoever has the key in KEYS_DIR (/keys), a volume
# that all hosts of the cluster share. The first host to start makes the keys there; no image holds any. Sessions get
# this container's PATH, LD_LIBRARY_PATH, DS_ACCELERATOR, CUDA_VISIBLE_DEVICES and OMP_*, NCCL_*, GLOO_* and HF_*
# variables: what `docker run -e` or the compose file sets holds for the ranks on this host as well.
set -euo pipefail

keys=${KEYS_DIR:-/keys}
port=${SSH_PORT:-2222}
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")

die() {
  echo "entrypoint.sh: $1" >&2
  exit 2
}

# One key for all hosts to log in with, one for all to be known by: nobody is asked whether a host is the right one.
make_keys() {
  mkdir -p "$keys" 2>/dev/null && [[ -w $keys ]] ||
    die "KEYS_DIR ($keys) must be a folder that user $(id -un) ($(id -u)) can write to: mount a volume there"
  (
    umask 077
    flock 9 # hosts start together
    [[ ! -f $keys/known_hosts ]] || exit 0
    rm -f "$keys"/id_ed25519* "$keys"/host_ed25519* # of a start that was cut off
    ssh-keygen -q -t ed25519 -N '' -C moe_train -f "$keys/id_ed25519"
    ssh-keygen -q -t ed25519 -N '' -C moe_train -f "$keys/host_ed25519"
    cp "$keys/id_ed25519.pub" "$keys/authorized_keys"
    echo "* $(cut -d' ' -f1,2 "$keys/host_ed25519.pub")" >"$keys/known_hosts.new"
    mv "$keys/known_hosts.new" "$keys/known_hosts" # last: now the others are whole
  ) 9>"$keys/.lock"
}

# For ssh, pdsh and mpirun in this container. A file of the user's own stays.
write_client_config() {
  local file=$HOME/.ssh/config
  if [[ -f $file ]] && ! grep -q '^# Written by entrypoint.sh' "$file"; then return; fi
  mkdir -p -m 700 "$HOME/.ssh"
  cat >"$file" <<EOF
# Written by entrypoint.sh
Host *
  Port $port
  IdentityFile $keys/id_ed25519
  UserKnownHostsFile $keys/known_hosts
  StrictHostKeyChecking yes
  LogLevel ERROR
EOF
}

session_variables() { # NAME="value" ..., as sshd_config quotes them
  local name
  for name in $(compgen -e); do
    case $name in
      PATH | LD_LIBRARY_PATH | DS_ACCELERATOR | CUDA_VISIBLE_DEVICES | OMP_* | NCCL_* | GLOO_* | HF_*)
        [[ ${!name} != *['"\']* && ${!name} != *$'\n'* ]] ||
          die "$name (${!name}) must be without quotation marks, backslashes and line breaks to reach sessions of sshd"
        printf ' %s="%s"' "$name" "${!name}"
        ;;
    esac
  done
}

write_server_config() {
  cat >"$HOME/.ssh/sshd_config" <<EOF
Port $port
HostKey $keys/host_ed25519
AuthorizedKeysFile $keys/authorized_keys
AuthenticationMethods publickey
UsePAM no
PidFile none
MaxStartups 100:30:200
SetEnv$1
EOF
}

run_sshd() {
  local daemon variables
  [[ $# == 0 ]] || die "sshd takes no arguments, not $*: SSH_PORT and KEYS_DIR are environment variables"
  [[ $port =~ ^[0-9]+$ ]] || die "SSH_PORT ($port) must be a number"
  daemon=$(PATH=$PATH:/usr/sbin command -v sshd) || die "sshd is not installed"
  variables=$(session_variables) # by itself: the exit code of a substitution inside a here-document is lost
  make_keys
  write_client_config
  write_server_config "$variables"
  if [[ $(id -u) == 0 ]]; then mkdir -p /run/sshd; fi
  exec "$daemon" -D -e -f "$HOME/.ssh/sshd_config"
}

[[ $# -gt 0 ]] || die "no command: deepspeed, torchrun, mpirun, moe-train, sshd, ...; help lists them"
word=$1
shift
# For every word that may start a launcher: the hosts of a cluster that have made keys are reached with them.
if [[ -f $keys/known_hosts && ! -f $HOME/.ssh/config ]]; then write_client_config; fi
case $word in
  help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" ;;
  sshd) run_sshd "$@" ;;
  keep_running.sh | launch/keep_running.sh) exec "$here/../launch/keep_running.sh" "$@" ;;
  deepspeed | torchrun | mpirun | mpiexec | moe-train | python | make | bash)
    command -v "$word" >/dev/null || die "$word is not on PATH ($PATH)"
    exec "$word" "$@"
    ;;
  *) die "$word: no such command; deepspeed, torchrun, mpirun, moe-train, sshd, ...; help lists them" ;;
esac
