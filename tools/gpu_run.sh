#!/usr/bin/env bash
# Measures everything that only a GPU can tell, in one command and a limited time.
#
#   tools/gpu_run.sh [--dry] [--out DIR] [--minutes 12] [--data PICTURES] [PART ...]
#
# Parts, in this order (all by default):
#   kernels   every kernel form against its reference, values and gradients
#   forward   the UNet of Stable Diffusion v1, batches 2 and 16, beside PyTorch and torch.compile
#   train     forward and backward, batch 8, beside PyTorch and torch.compile
#   decode    512x512 pictures, batches 1 and 8, beside PyTorch
#   picture   text to image, 50 steps, batch 1, beside PyTorch
#   demo      the shipped demo, trained further in the time that is left
#   pictures  sampled from it
#
# JSON, logs and pictures go to DIR (gpu_run). A part that finished is not run again: the same
# command resumes after an interruption. Every part has a time limit of its own, and the parts
# together --minutes. --data names the pictures of the demo (else the few that are shipped). --dry
# runs everything on the CPU with small sizes. Needs pip install "ldm_jax[cuda,parity]"; PYTHON names
# the interpreter.
set -u
cd "$(dirname "$0")/.."

out=gpu_run minutes=12 data=pkg:assets/emoji_subset.zip dry= parts=()
while [ $# -gt 0 ]; do
  case $1 in
    --dry) dry=1 ;;
    --out) out=$2; shift ;;
    --minutes) minutes=$2; shift ;;
    --data) data=$2; shift ;;
    kernels | forward | train | decode | picture | demo | pictures) parts+=("$1") ;;
    *) echo "gpu_run.sh: unknown argument $1; see the head of this file" >&2; exit 2 ;;
  esac
  shift
done
[ ${#parts[@]} -gt 0 ] || parts=(kernels forward train decode picture demo pictures)

python=${PYTHON:-python}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$out"
out=$(cd "$out" && pwd)
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$out/compiled}
end=$(($(date +%s) + 60 * minutes))
if [ "$dry" ]; then
  export JAX_PLATFORMS=cpu
  training=(--config=configs/emoji.py:smoke --config.steps=2 --config.batch_size=2)
  sampling=(--num=1 --steps=2)
else
  "$python" -c 'import jax; raise SystemExit(jax.default_backend() != "gpu")' ||
    { echo "gpu_run.sh: JAX sees no GPU; --dry runs on the CPU" >&2; exit 2; }
  training=(--config=configs/emoji.py --config.init=emoji --config.data.path="$data"
    --config.model.first_stage.path=pkg:assets/emoji --config.steps=1000000
    --config.dtype=bfloat16 --config.batch_size=256)
  sampling=(--num=16 --steps=50)
fi

# Sets `size`, the flags of a benchmark.
batches() {
  if [ "$dry" ]; then
    size=(--case emoji --batch 1 --repeats 1)
    return
  fi
  size=(--case sd_v1 --dtype bfloat16 --compile --repeats 10 --batch)
  case $1 in
    forward) size+=(2 16) ;;
    train) size+=(8) ;;
    decode) size+=(1 8) ;;
    *) size+=(1) ;;
  esac
}

# Sets `command` and `own`, the seconds that a part may take by itself.
command_of() {
  own=180
  case $1 in
    kernels)
      command=("$python" tools/kernel_checks.py ${dry:+--dry} --json "$out/kernels.json")
      own=150
      ;;
    forward) command=("$python" -m benchmarks.unet_forward "${size[@]}" --json "$out/forward.json") ;;
    train) command=("$python" -m benchmarks.unet_train "${size[@]}" --json "$out/train.json") ;;
    decode) command=("$python" -m benchmarks.decode "${size[@]}" --json "$out/decode.json") ;;
    picture) command=("$python" -m benchmarks.text_to_image "${size[@]}" --json "$out/picture.json") ;;
    demo)
      # All that is left but two minutes for the pictures. The limit's SIGTERM makes it save.
      own=$((end - $(date +%s) - 120))
      command=("$python" train.py --workdir="$out/demo" "${training[@]}")
      ;;
    pictures)
      local model=emoji
      [ -d "$out/demo/model" ] && model=$out/demo/model
      command=("$python" sample.py --model="$model" --prompt="red apple, noto style"
        --out="$out/pictures" "${sampling[@]}")
      ;;
  esac
  [ "$dry" ] && own=120
}

status=0
for part in "${parts[@]}"; do
  [ -e "$out/$part.done" ] && { echo "$part: done before"; continue; }
  batches "$part"
  command_of "$part"
  left=$((end - $(date +%s)))
  seconds=$((own < left ? own : left))
  if [ "$seconds" -lt 10 ]; then
    echo "$part: no time left; the same command resumes here" >&2
    status=1
    continue
  fi
  began=$(date +%s)
  timeout -k 30 "$seconds" "${command[@]}" > "$out/$part.log" 2>&1
  code=$?
  took=$(($(date +%s) - began))
  # A training that saved when its time was over ends with 75.
  if [ $code = 0 ] || { [ "$part" = demo ] && [ -d "$out/demo/model" ]; }; then
    touch "$out/$part.done"
    echo "$part: done in $took s"
  else
    echo "$part: failed (status $code) after $took of at most $seconds s:" >&2
    tail -n 3 "$out/$part.log" >&2
    status=1
  fi
done
exit $status
