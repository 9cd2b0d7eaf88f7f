#!/usr/bin/env bash
# Trains with several processes on this machine, as several hosts would: to try
# a run of many hosts, or to give each process some of the machine's devices.
#
#   NUM_PROCESSES=2 launch/local_processes.sh --config=configs/digits.py:debug
#
# Each process is a launch/single_host.sh with the flags that several machines
# need. On a CPU, XLA_FLAGS=--xla_force_host_platform_device_count=2 gives each
# process two devices. On GPUs set CUDA_VISIBLE_DEVICES in `environment` below.
#
# SIGTERM goes on to all of them: they save and end, and this ends with 75.
# DRY_RUN=1 prints the commands and starts nothing.
set -euo pipefail

NUM_PROCESSES=${NUM_PROCESSES:-2}
PORT=${PORT:-$((20000 + RANDOM % 10000))}  # free, for the processes to meet at
DRY_RUN=${DRY_RUN:-0}
export DRY_RUN

environment() {  # of process $1, as NAME=VALUE
  echo "PROCESS_ID=$1"  # or CUDA_VISIBLE_DEVICES=$1
}

here=$(dirname "$0")
children=()
stopped=0
forward() {
  stopped=1
  [[ ${#children[@]} == 0 ]] || kill -TERM "${children[@]}" 2>/dev/null || true
}
trap forward TERM INT
for ((id = 0; id < NUM_PROCESSES; id++)); do
  process=(env "$(environment "$id")" "$here/single_host.sh" "$@"
    --coordinator="127.0.0.1:$PORT"
    --num_processes="$NUM_PROCESSES" --process_id="$id")
  if [[ $DRY_RUN == 0 ]]; then
    "${process[@]}" &
    children+=($!)
  else
    "${process[@]}"
  fi
done
[[ $DRY_RUN == 0 ]] || exit 0
[[ $stopped == 0 ]] || forward  # those that started since

result=0
for child in "${children[@]}"; do
  while kill -0 "$child" 2>/dev/null; do  # signals end the waiting, not it
    wait "$child" || true
  done
  code=0
  wait "$child" || code=$?  # it has ended: what with, the shell remembers
  ((code <= result)) || result=$code
done
exit "$result"
