#!/usr/bin/env bash
# Starts a training again when it ends by a fault: it goes on from its newest whole checkpoint.
#
#   launch/keep_running.sh [--max-restarts N] [--wait SECONDS] [--run-dir DIR] -- COMMAND ...
#   launch/keep_running.sh -- deepspeed --hostfile launch/hostfile launch/train.py --config configs/NAME.yaml
#
# COMMAND is any launcher with launch/train.py, or moe-train train: deepspeed, torchrun, mpirun, srun. On several hosts
#
#   launch/keep_running.sh -- moe-train launch --hostfile FILE --allow-fewer-hosts -- launch/train.py ...
#
# goes on with the hosts that are left.
#
# --max-restarts N   Give up after N restarts in a row without progress: no new checkpoint since (default 3).
# --wait SECONDS     Before a restart (default 5).
# --run-dir DIR      Where the checkpoints are; default: --train.run_dir of COMMAND. Where neither is given (it is in
#                    the YAML file), progress cannot be seen, and all restarts count.
#
# It ends, with COMMAND's exit code, on
#   0    done. Where the run folder is known, 0 without a new summary.json is a fault: deepspeed also returns 0 when its
#        own launcher was killed.
#   2    a usage error, which would come again
#   65   the numbers went wrong for good: diagnosis.json in the run folder says where
#   75   stopped by a signal after saving
#   any  after SIGTERM, SIGINT, SIGUSR1 or SIGHUP to this script. It lets the ranks finish their step and save, waits
#        for them, and starts nothing any more. A second signal is handed on too, and ends the ranks at once.
# On any other code it ends what COMMAND left running on this host and starts it again.
set -euo pipefail

usage() {
  echo "keep_running.sh: $1" >&2
  echo "usage: launch/keep_running.sh [--max-restarts N] [--wait SECONDS] [--run-dir DIR] -- COMMAND ..." >&2
  exit 2
}

say() { echo "keep_running.sh: $1" >&2; }

max_restarts=3 wait_seconds=5 run_dir=''
while [[ $# -gt 0 && $1 != -- ]]; do
  [[ $# -ge 2 ]] || usage "$1: unknown, or its value is missing"
  case $1 in
    --max-restarts) max_restarts=$2 ;;
    --wait) wait_seconds=$2 ;;
    --run-dir) run_dir=$2 ;;
    *) usage "$1: no such option (is -- missing before the command?)" ;;
  esac
  shift 2
done
[[ $# -ge 2 ]] || usage "no command: it follows --"
shift
[[ $max_restarts =~ ^[0-9]+$ ]] || usage "--max-restarts ($max_restarts) must be a whole number"
[[ $wait_seconds =~ ^[0-9]+$ ]] || usage "--wait ($wait_seconds) must be whole seconds"

launcher=''
previous=''
for word in "$@"; do
  name=${word##*/}
  name=${name%.sh} # launch/torchrun.sh and its like become the launcher
  case $name in
    launch) if [[ $previous == *moe-train || $previous == *moe_train ]]; then launcher=${launcher:-launch}; fi ;;
    deepspeed | torchrun | torch.distributed.run | mpirun | mpiexec | prterun | srun) launcher=${launcher:-$name} ;;
  esac
  if [[ -z $run_dir && $word == --train.run_dir=* ]]; then run_dir=${word#*=}; fi
  if [[ -z $run_dir && $previous == --train.run_dir ]]; then run_dir=$word; fi
  previous=$word
done

# What COMMAND starts on this host carries the mark: torchrun's ranks are in sessions of their own.
mark=KEEP_RUNNING_MARK=$$.$(date +%s)
marked() { grep -lszxF "$mark" /proc/[0-9]*/environ | cut -d/ -f3 || true; }
is_rank() { grep -qsz '^LOCAL_RANK=' "/proc/$1/environ"; }

ranks() { # and not what a rank has started
  local each parent
  for each in $(marked); do
    if is_rank "$each"; then
      parent=$(sed -n 's/^PPid:[^0-9]*//p' "/proc/$each/status" 2>/dev/null || true)
      is_rank "$parent" || echo "$each"
    fi
  done
}

# The signal that lets the ranks save and the launcher live until they have.
hand_on() {
  case $launcher in
    launch) # stops the ranks on all hosts
      kill -TERM "$pid" 2>/dev/null || true ;;
    torchrun | torch.distributed.run) # sends SIGTERM to all ranks; one that exits by itself would be started again
      kill -TERM "$pid" 2>/dev/null || true ;;
    mpirun | mpiexec | prterun | srun) # send SIGUSR1 to all ranks, whereas SIGTERM ends them after a few seconds
      kill -USR1 "$pid" 2>/dev/null || true ;;
    *) # deepspeed's launcher ends the ranks 30 s after SIGTERM, and returns 1: any rank's signal is everybody's
      local found
      found=$(ranks)
      # shellcheck disable=SC2086 # several pids
      if [[ -n $found ]]; then
        kill -USR1 $found 2>/dev/null || true
      else # not started yet, on other hosts, or without a launcher
        kill -TERM -- "-$pid" 2>/dev/null || true
      fi ;;
  esac
}

stop=''
interrupted=''
pid=''
take() {
  say "$1: no restart any more"
  stop=$1
  interrupted=1
  if [[ -n $pid ]]; then hand_on; fi
}
for name in TERM INT USR1 HUP; do
  # shellcheck disable=SC2064 # the name of now
  trap "take SIG$name" "$name"
done

# Of a command that has ended; a rank without its launcher would go on writing to the run folder.
end_left_over() {
  local name left seconds=$1
  for name in TERM KILL; do
    for ((; seconds > 0; seconds--)); do
      [[ -n $(marked) ]] || return 0
      sleep 1 || true
    done
    left=$(marked)
    [[ -n $left ]] || return 0
    say "still running, now ended by SIG$name: $(tr '\n' ' ' <<<"$left")"
    # shellcheck disable=SC2086
    kill "-$name" $left 2>/dev/null || true
    seconds=10
  done
}

summary() { stat -c '%y %i' "$run_dir/summary.json" 2>/dev/null || true; }
newest() { cat "$run_dir/checkpoints/latest" 2>/dev/null || true; }

set -m # COMMAND gets a process group of its own: Ctrl-C comes to this script alone
restarts=0
while :; do
  summary_before=$(summary)
  newest_before=$(newest)
  env "$mark" "$@" </dev/null &
  pid=$!
  if [[ -n $stop ]]; then hand_on; fi
  code=0
  wait "$pid" || code=$?
  while [[ -n $interrupted ]]; do # by a signal to this script: COMMAND runs on, or its code can be asked for again
    interrupted=''
    code=0
    wait "$pid" || code=$?
  done

  if [[ -n $stop ]]; then
    end_left_over 600 # a launcher may be gone before its ranks have saved
    exit "$code"
  fi
  if [[ $code == 0 && -d $run_dir && $(summary) == "$summary_before" ]]; then
    say "exit code 0, but $run_dir/summary.json was not written: a fault"
    code=1
  fi
  if [[ $code == 0 || $code == 2 || $code == 65 || $code == 75 ]]; then
    end_left_over 5
    exit "$code"
  fi
  if [[ -n $run_dir && $(newest) != "$newest_before" ]]; then restarts=0; fi
  if ((restarts >= max_restarts)); then
    say "exit code $code: given up after $restarts restarts without progress"
    end_left_over 5
    exit "$code"
  fi
  restarts=$((restarts + 1))
  say "exit code $code: restart $restarts of $max_restarts without progress, in $wait_seconds s"
  end_left_over 5
  for ((left = wait_seconds; left > 0; left--)); do
    if [[ -z $stop ]]; then sleep 1 || true; fi
  done
  if [[ -n $stop ]]; then exit "$code"; fi
  interrupted=''
done
