#!/usr/bin/env bash
# Trains on this machine, and starts again until the run is done.
#
#   launch/single_host.sh --config=configs/ffhq64.py --workdir=runs/ffhq64
#
# All arguments go to `python -m diffit_jax.main`, which ends with
#   0              done: so does this script
#   75             saved after a SIGTERM: start again, but if the signal came to
#                  this script (the machine goes down), end with 75
#   anything else  a crash: start again, MAX_CRASHES times in a row
#
# Several machines without a scheduler: run it on each of them, and add
#   --coordinator=HOST:PORT --num_processes=N --process_id=I
# with the same HOST:PORT (process 0's), an I of its own, and a shared workdir.
#
# DRY_RUN=1 prints the command and starts nothing.
set -euo pipefail

PYTHON=${PYTHON:-python}            # of the environment with diffit_jax
MAX_CRASHES=${MAX_CRASHES:-3}       # in a row; an hour's work begins a new row
RETRY_SECONDS=${RETRY_SECONDS:-10}  # before it starts again after a crash
DRY_RUN=${DRY_RUN:-0}

command=("$PYTHON" -m diffit_jax.main "$@")
if [[ $DRY_RUN != 0 ]]; then
  printf '%q ' "${command[@]}" && echo
  exit
fi

child=""
stopped=0
forward() {
  stopped=1
  [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true
}
trap forward TERM INT

crashes=0
while true; do
  begin=$SECONDS
  "${command[@]}" &
  child=$!
  ((stopped == 0)) || kill -TERM "$child"
  while kill -0 "$child" 2>/dev/null; do  # signals end the waiting, not it
    wait "$child" || true
  done
  code=0
  wait "$child" || code=$?  # it has ended: what with, the shell remembers
  ((code != 0 && stopped == 0)) || exit "$code"
  ((code != 75 && SECONDS - begin < 3600)) || crashes=0
  if ((code != 75)); then
    ((++crashes <= MAX_CRASHES)) || exit "$code"
    echo "exit code $code, crash $crashes: again in $RETRY_SECONDS s" >&2
    sleep "$RETRY_SECONDS"
    ((stopped == 0)) || exit "$code"
  fi
done
