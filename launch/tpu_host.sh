#!/usr/bin/env bash
# What launch/tpu_pod.sh runs on each host of the slice: installs the program,
# copies the data sets, and trains. JAX finds the other hosts by itself.
#
#   DATA=gs://B/tfds diffit_jax/launch/tpu_host.sh --config=configs/ffhq64.py
#
# DRY_RUN=1 prints the commands and starts nothing.
set -euo pipefail

DATA=${DATA:?gs:// folder of prepared data sets, copied to this host}
DRY_RUN=${DRY_RUN:-0}

run() {
  if [[ $DRY_RUN == 0 ]]; then "$@"; else printf '%q ' "$@" && echo; fi
}

cd "$(dirname "$0")/.."
# The images come with Python 3.10: uv brings a newer one.
run python3 -m pip install --quiet uv
[[ -d .venv ]] || run python3 -m uv venv --quiet --python 3.11 .venv
run python3 -m uv pip install --quiet --python .venv \
  --constraint constraints.txt --editable '.[tpu,gcp]'
run mkdir -p "$HOME/tensorflow_datasets"
run gcloud storage rsync --recursive "$DATA" "$HOME/tensorflow_datasets"

# A former run whose connection was lost would keep the chips: let it save, then
# end it. The lock of a killed process would keep them, too.
if [[ $DRY_RUN == 0 ]]; then
  former='bash launch/single_host.sh|-m diffit_jax.main'
  pkill -f "$former" && sleep 60 && { pkill -KILL -f "$former" || true; }
fi
run sudo rm -f /tmp/libtpu_lockfile
export PYTHON=.venv/bin/python
run launch/single_host.sh "$@"
