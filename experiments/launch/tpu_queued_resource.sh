#!/usr/bin/env bash
# A TPU pod slice by queued resources: waits for one, runs on all of its hosts, and asks
# for another when this one is preempted. v5litepod-64 is v5e:8x8, 16 hosts of 4 chips.
#
#   PROJECT=... ZONE=... BUCKET=... REPOSITORY=https://... \
#     bash experiments/launch/tpu_queued_resource.sh
#
# Needs gcloud, a TPU quota, and a bucket in the zone's region. The TPU's service account
# needs the roles storage.objectAdmin and storage.legacyBucketReader on it (Orbax looks at
# the bucket itself). Checkpoints and compiled programs live in the bucket, so that they
# survive the machines. A spot slice that is preempted is shut down: SIGTERM and about
# half a minute, in which the run saves if it can; if not, the newest checkpoint is good.
# The run does not hang on this script's connection: it may be stopped and started again.
# The run's folder is brought there, too: at the end with the model, 27 GB.
# All slices of a run have the code of COMMIT and, by a lock file in the bucket, the same
# packages.
set -euo pipefail
: "${PROJECT:?}" "${ZONE:?}" "${BUCKET:?}" "${REPOSITORY:?}"
COMMIT="${COMMIT:-$(git rev-parse HEAD)}" # that REPOSITORY has, too
NAME="${NAME:-llama-7b}"
RUN="gs://$BUCKET/llama_7b"

gtpu() { gcloud compute tpus "$@" --project="$PROJECT" --zone="$ZONE"; }
state() { gtpu queued-resources describe "$NAME" --format='value(state.state)' || true; }
give_back() { gtpu queued-resources delete "$NAME" --force --quiet; }

# On every host. The run folder (config, metrics, report) is the first host's: it comes
# from the bucket, and goes there every five minutes and at the end, with the exit code.
on_host="
set -u
# A shutdown sends SIGTERM to the run as well, whose end is waited for.
trap : TERM
export PATH=\$HOME/.local/bin:\$PATH
export JAX_COMPILATION_CACHE_DIR=$RUN/jax-cache
command -v uv || pip install --user uv
test -d ngalore-jax || git clone $REPOSITORY ngalore-jax
cd ngalore-jax && git fetch --quiet && git checkout --quiet $COMMIT || {
  echo \"$REPOSITORY has no commit $COMMIT, or cannot be read\" >&2
  echo 1 | gcloud storage cp - $RUN/exit-code
  exit 1
}
gcloud storage cp $RUN/uv.lock uv.lock || {
  uv lock && gcloud storage cp --no-clobber uv.lock $RUN/uv.lock
  gcloud storage cp $RUN/uv.lock uv.lock
}
worker=\$(curl -s -H Metadata-Flavor:Google http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number)
keep() { gcloud storage rsync -r runs/llama_7b $RUN/run; }
if [ \"\$worker\" = 0 ]; then
  mkdir -p runs/llama_7b
  if gcloud storage ls $RUN/run >/dev/null 2>&1; then
    until gcloud storage rsync -r $RUN/run runs/llama_7b; do sleep 30; done
  fi
  while sleep 300; do keep; done > /tmp/keep.log 2>&1 &
  keeper=\$!
fi
crashes=0
while true; do
  SECONDS=0
  uv run --group tpu python -m experiments.pretrain \
    --preset llama_7b --data c4 --streams 64 \
    --mesh.fsdp 64 --mesh.distributed \
    --model.dtype bfloat16 --model.remat layer \
    --run-dir runs/llama_7b --auto-resume \
    --checkpoint-dir gs://$BUCKET/llama_7b/checkpoints
  code=\$?
  # Anything else is a crash, of this host or another, or may pass (75): all of them start
  # again, but not for good where each ends soon.
  case \$code in 0 | 1 | 2 | 130 | 143) break ;; esac
  if [ \$SECONDS -gt 600 ]; then crashes=0; fi
  crashes=\$((crashes + 1))
  if [ \$crashes -gt 20 ]; then break; fi
  sleep 30
done
if [ \"\$worker\" = 0 ]; then
  kill \$keeper; keep
  # 143: preempted, which this is not the end of.
  if [ \$code -ne 143 ]; then echo \$code | gcloud storage cp - $RUN/exit-code; fi
fi"

start() {
  local quoted
  quoted=$(printf '%q' "$on_host")
  # A lock, for a script started again finds the run going on.
  gtpu tpu-vm ssh "$NAME" --worker=all --command="
    nohup flock --nonblock --close run.lock bash -c $quoted >> run.log 2>&1 < /dev/null &"
}

finish() {
  local code
  code=$(gcloud storage cat "$RUN/exit-code")
  gcloud storage rm "$RUN/exit-code"
  give_back
  echo "ended with exit code $code; the run's folder is in $RUN/run"
  exit "$code"
}

started=false
while true; do
  if gcloud storage ls "$RUN/exit-code" >/dev/null 2>&1; then finish; fi
  case "$(state)" in
    ACTIVE)
      if ! $started && start; then started=true; fi
      ;;
    SUSPENDED | FAILED)
      echo "the slice was taken away; asking for another" >&2
      started=false
      give_back
      ;;
    "")
      started=false
      gtpu queued-resources create "$NAME" --node-id="$NAME" \
        --accelerator-type=v5litepod-64 --runtime-version=v2-alpha-tpuv5-lite --spot
      ;;
  esac
  sleep 60
done
