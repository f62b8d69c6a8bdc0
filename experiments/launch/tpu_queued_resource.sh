#!/usr/bin/env bash
# A TPU pod slice by queued resources: waits for one, runs on all of its hosts, and asks
# for another when this one is preempted. v5litepod-64 is v5e:8x8, 16 hosts of 4 chips.
#
#   PROJECT=... ZONE=... BUCKET=... REPOSITORY=https://... \
#     bash experiments/launch/tpu_queued_resource.sh
#
# Needs gcloud, a TPU quota, and a bucket in the zone's region that the TPU's service
# account may write. Checkpoints live in the bucket, so that they survive the machines;
# gcsfs is what opens it. A spot slice that is preempted is shut down: SIGTERM and about
# half a minute, in which the run saves if it can; if not, the newest checkpoint is good.
set -euo pipefail
: "${PROJECT:?}" "${ZONE:?}" "${BUCKET:?}" "${REPOSITORY:?}"
NAME="${NAME:-llama-7b}"

gtpu() { gcloud compute tpus "$@" --project="$PROJECT" --zone="$ZONE"; }
state() { gtpu queued-resources describe "$NAME" --format='value(state.state)'; }
everywhere() { gtpu tpu-vm ssh "$NAME" --worker=all --command="$1"; }

# The run folder (config, metrics, report) is the first host's. It goes to the bucket
# every five minutes and at the end, and comes from there to the next slice.
everything="
set -u
export PATH=\$HOME/.local/bin:\$PATH
command -v uv || pip install --user uv
test -d ngalore-jax || git clone $REPOSITORY ngalore-jax
cd ngalore-jax
worker=\$(curl -s -H Metadata-Flavor:Google http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number)
keep() { gcloud storage rsync -r runs/llama_7b gs://$BUCKET/llama_7b/run; }
if [ \"\$worker\" = 0 ]; then
  mkdir -p runs/llama_7b
  gcloud storage rsync -r gs://$BUCKET/llama_7b/run runs/llama_7b
  while sleep 300; do keep; done > /tmp/keep.log 2>&1 &
  keeper=\$!
fi
uv run --group tpu --with gcsfs python -m experiments.pretrain \
  --preset llama_7b --data c4 --streams 64 \
  --mesh.fsdp 64 --mesh.distributed \
  --model.dtype bfloat16 --model.remat layer \
  --run-dir runs/llama_7b --auto-resume \
  --checkpoint-dir gs://$BUCKET/llama_7b/checkpoints
code=\$?
if [ \"\$worker\" = 0 ]; then kill \$keeper; keep; fi
exit \$code"

while true; do
  gtpu queued-resources create "$NAME" --node-id="$NAME" \
    --accelerator-type=v5litepod-64 --runtime-version=v2-alpha-tpuv5-lite --spot
  until [ "$(state)" = ACTIVE ]; do sleep 60; done
  code=0
  everywhere "$everything" || code=$?
  sleep 120 # until a preemption shows in the state
  if [ "$(state)" = ACTIVE ]; then
    # The slice is there, so the run ended by itself: done, or an error told above.
    gtpu queued-resources delete "$NAME" --force --quiet
    exit "$code"
  fi
  echo "the slice was taken away; asking for another" >&2
  gtpu queued-resources delete "$NAME" --force --quiet
done
