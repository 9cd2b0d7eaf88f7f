#!/usr/bin/env bash
# Trains on a Cloud TPU slice: asks for it in the queue, starts the same command
# on all its hosts, and asks again when it was preempted. Run it where it can
# stay (tmux on a small VM); run it again to go on.
#
#   DATA=gs://B/tensorflow_datasets launch/tpu_pod.sh \
#       --config=configs/ffhq64.py --workdir=gs://B/runs/ffhq64 \
#       --config.mesh.num_devices=16
#
# DRY_RUN=1 prints the commands and starts nothing.
set -euo pipefail

NAME=${NAME:-diffit}                                # of the queued resource
ZONE=${ZONE:-us-west4-a}
ACCELERATOR_TYPE=${ACCELERATOR_TYPE:-v5litepod-16}  # 16 chips on 4 hosts
RUNTIME_VERSION=${RUNTIME_VERSION:-v2-alpha-tpuv5-lite}
TIER=${TIER:---spot}                                # --reserved, --guaranteed
REPOSITORY=${REPOSITORY:-https://github.com/OWNER/diffit_jax}
DATA=${DATA:?gs:// folder of prepared data sets, copied to each host}
POLL_SECONDS=${POLL_SECONDS:-60}
MAX_CRASHES=${MAX_CRASHES:-3}  # in a row; an hour's work begins a new row
DRY_RUN=${DRY_RUN:-0}

run() {
  if [[ $DRY_RUN == 0 ]]; then "$@"; else printf '%q ' "$@" && echo; fi
}
slice() {  # slice VERB [FLAGS]
  run gcloud compute tpus queued-resources "$1" "$NAME" --zone="$ZONE" "${@:2}"
}
remote="[ -d diffit_jax ] || git clone -q '$REPOSITORY' diffit_jax;"
remote+=" DATA='$DATA' diffit_jax/launch/tpu_host.sh $(printf '%q ' "$@")"

said=$(mktemp)
trap 'rm -f "$said"' EXIT
format="value(state.state)"
crashes=0
while true; do
  state=NOT_FOUND
  if [[ $DRY_RUN == 0 ]] &&
    ! state=$(slice describe --format="$format" 2>"$said"); then
    state=$(grep -o -m 1 NOT_FOUND "$said") || cat "$said" >&2  # ask again
  fi
  case $state in
    NOT_FOUND) slice create --node-id="$NAME" "$TIER" \
      --accelerator-type="$ACCELERATOR_TYPE" \
      --runtime-version="$RUNTIME_VERSION" ;;
    SUSPENDED) crashes=0 && slice delete --force --quiet && continue ;;
    FAILED) slice describe && exit 1 ;;
  esac
  if [[ $state == ACTIVE || $DRY_RUN != 0 ]]; then
    begin=$SECONDS
    code=0
    slice ssh --node=all --worker=all --command="$remote" || code=$?
    [[ $code != 0 ]] || { slice delete --force --quiet && exit; }
    ((SECONDS - begin < 3600)) || crashes=0
    ((++crashes <= MAX_CRASHES)) || exit "$code"
  fi
  sleep "$POLL_SECONDS"
done
