#!/usr/bin/env bash
# Make the recordings again on a GPU host with nsys and vLLM. Usage: record.sh MODEL_DIR OUT_DIR
# MODEL_DIR holds the config.json of a small DeepSeek-V3.2; about 15 minutes on an H100.
set -euo pipefail
model=$(realpath "${1:?folder with config.json}"); out=$(mkdir -p "${2:?output folder}" && realpath "$2")
here=$(cd "$(dirname "$0")" && pwd)
flags="--served-model-name m --skip-tokenizer-init --load-format dummy --max-model-len 8192 --max-num-seqs 64
  --max-num-batched-tokens 8192 --no-enable-prefix-caching --gpu-memory-utilization 0.7
  --compilation-config '{\"mode\":0,\"cudagraph_mode\":\"FULL_DECODE_ONLY\",\"cudagraph_capture_sizes\":[1,4,16]}'"

align() {  # align NAME [OPTION …]: one live alignment, its exports slimmed into OUT/NAME-*.sqlite.gz
  local name=$1 run side; shift
  opkit align dsa "$@" --backend vllm --model "$model" --out "$out/$name" --e2e-cmd "vllm serve $model $flags" || true
  run=$(ls -d "$out/$name"/align-* | tail -n 1)
  for side in e2e mock strict; do
    [ -f "$run/$side.sqlite" ] && opkit trace slim "$run/$side.sqlite" "$out/$name-$side.sqlite.gz"
  done
}

wrong() {  # wrong FAULT: one wrong mock at a few of the late run's shapes
  local fault=$1 plan="$out/wrong/$1.plan.json"
  mkdir -p "$out/wrong"
  python3 - "$out" "$fault" > "$plan" <<'PY'
import glob, json, sys
out, fault = sys.argv[1:]
plan = json.load(open(sorted(glob.glob(f"{out}/late/align-*/mock.plan.json"))[-1]))
kept = {}
for case in plan["cases"]:
    context = case["phase"] == "context"
    if case["batch"] in ((1,) if context else (1, 4)) and (not context or case["tokens"] in (1024, 4096)):
        kept.setdefault((case["phase"], case["batch"], case["tokens"]), case)
plan |= {"cases": list(kept.values()), "iterations": 6, "warmup": 2}
plan["manifest"] = f"{out}/wrong/{fault}.opkit.json"
json.dump(plan, sys.stdout)
PY
  nsys profile -t cuda,nvtx --cuda-graph-trace=node --sample=none --cpuctxsw=none \
    --capture-range=cudaProfilerApi --capture-range-end=stop -o "$out/wrong/$fault" --force-overwrite=true \
    python3 "$here/wrong_mocks.py" "$fault" "$plan"
  python3 -c "
import sys; from pathlib import Path; from opkit.nsys_parsers.tool import export_sqlite
export_sqlite(Path(sys.argv[1]), Path(sys.argv[2]))" "$out/wrong/$fault.nsys-rep" "$out/wrong/$fault.sqlite"
  opkit trace slim "$out/wrong/$fault.sqlite" "$out/wrong/$fault.sqlite.gz"
}

align late
align process --window process
align strict --strict
for fault in fp8_kv eager half_heads no_indexer batch batch_labelled extra_elementwise norm_fp32 split_fused \
             zero_activations equal_rows zero_weights no_kv_write no_index_write; do
  wrong "$fault"
done
