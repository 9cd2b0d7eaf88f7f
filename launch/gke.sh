#!/usr/bin/env bash
# Trains on a TPU slice of the GKE cluster that kubectl talks to.
#
#   IMAGE=REGION-docker.pkg.dev/P/R/diffit_jax launch/gke.sh \
#       --config=configs/imagenet256.py --workdir=gs://B/runs/imagenet256 \
#       --config.mesh.num_devices=16
#
# Fills launch/gke_jobset.yaml in and applies it; the JobSet controller starts
# the hosts again when they are preempted, and MAX_RESTARTS times after crashes.
# `kubectl logs -f -l jobset.sigs.k8s.io/jobset-name=NAME` shows what they say,
# `kubectl delete jobset NAME` saves the step and ends the run.
#
# DRY_RUN=1 prints the filled-in file and applies nothing.
set -euo pipefail

: "${1:?needs the arguments of diffit_jax.main, as --config=FILE}"
IMAGE=${IMAGE:?image with this repository as its working folder, installed}
NAME=${NAME:-diffit}
HOSTS=${HOSTS:-4}                       # of the slice
TOPOLOGY=${TOPOLOGY:-4x4}               # of its chips
CHIPS_PER_HOST=${CHIPS_PER_HOST:-4}
ACCELERATOR=${ACCELERATOR:-tpu-v5-lite-podslice}
MAX_RESTARTS=${MAX_RESTARTS:-3}
DRY_RUN=${DRY_RUN:-0}

filled=$(
  printf '                    - "%s"\n' "$@" | sed -E \
    -e "s|^(  name:) .*|\1 $NAME|" \
    -e "s|^( *image:) .*|\1 $IMAGE|" \
    -e "s/^( *(completions|parallelism):) .*/\1 $HOSTS/" \
    -e "s|^( *maxRestarts:) .*|\1 $MAX_RESTARTS|" \
    -e "s|(gke-tpu-topology:) .*|\1 $TOPOLOGY|" \
    -e "s|(gke-tpu-accelerator:) .*|\1 $ACCELERATOR|" \
    -e "s|(google.com/tpu:) [0-9]+|\1 $CHIPS_PER_HOST|" \
    -e '/^ *- --/d' -e '/^ *args:$/r /dev/stdin' \
    "$(dirname "$0")/gke_jobset.yaml"
)
if [[ $DRY_RUN != 0 ]]; then
  printf '%s\n' "$filled"
else
  kubectl apply -f - <<<"$filled"
fi
