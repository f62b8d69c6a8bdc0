#!/usr/bin/env bash
# One machine with 8 GPUs: one process drives all of them.
#
#   bash experiments/launch/node_8gpu.sh
#
# Run it from the repository. Started again, it goes on where it stopped. Ctrl-C and
# SIGTERM save first. What kills the process (memory, SIGKILL) or may pass (a driver
# error, the network: exit code 75) is started again here; what is wrong with the run (1
# or 2) is not, nor what ends soon again and again.
set -uo pipefail

# JAX takes 75 % of each GPU's memory otherwise.
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.92
export JAX_PLATFORMS=cuda # an error in place of the CPU, where CUDA is not found
# A second start need not compile again.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/jax}"

# The shell hears signals itself only while what it waits for is in the background; in a
# process group of its own that hears of them from here alone.
set -m
stopping=false
stop() { stopping=true; kill -TERM "$pid" 2>/dev/null; }
trap stop INT TERM

# The exit code of the last command started; a signal ends one `wait`, not the command.
ended() {
  local code
  while true; do
    wait "$pid"; code=$?
    kill -0 "$pid" 2>/dev/null || return $code
  done
}

crashes=0
while true; do
  SECONDS=0
  uv run --with 'jax[cuda12]' python -m experiments.pretrain \
    --preset llama_350m --data c4 --workers 8 \
    --mesh.fsdp 8 --model.dtype bfloat16 \
    --token-cache "$HOME/.cache/ngalore-tokens" \
    --run-dir runs/llama_350m --auto-resume &
  pid=$!
  ended; code=$?
  case $code in
    0 | 1 | 2) exit $code ;;     # done, or an error that starting again does not mend
    130 | 143) exit $code ;;     # somebody stopped it; the run is saved
  esac
  $stopping && exit $code
  if [ "$SECONDS" -gt 600 ]; then crashes=0; fi
  crashes=$((crashes + 1))
  if [ "$crashes" -gt 20 ]; then exit "$code"; fi
  echo "ended with code $code; starting again in 30 s" >&2
  sleep 30 &
  pid=$!
  ended
  $stopping && exit 143
done
