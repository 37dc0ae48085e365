#!/usr/bin/env bash
# Rehearses every shipped configuration on its documented slice, one after another; a table and the failures at the end.
# Each line below is a configuration and its slice. A pattern as the first argument chooses lines: rehearse_all.sh qwen3
set -uo pipefail
cd "$(dirname "$0")/.." || exit
python="${PYTHON:-python3}" pattern="${1:-}" failed=0 table=""

# rehearse WHAT OPTION ...: WHAT is a file under configs/ with its argument.
rehearse() {
  [[ "$*" =~ $pattern ]] || return 0
  local began=$SECONDS result=ok
  echo "==== $*"
  "$python" tools/rehearse.py --config "configs/$1" "${@:2}" || result=FAILED failed=1
  table+="$result  $((SECONDS - began)) s  $*"$'\n'
}

# docs/tpu_pods.md: 16 chips of 4 hosts, as TPU VMs, as a JobSet of one slice, and through XPK, which run the same program.
pod=(--hosts 4 --devices_per_host 4 --topology v5p:2x2x4)
rehearse qwen3_4b_numina_math.py:rredcot "${pod[@]}"
rehearse qwen3_4b_numina_math.py:grpo "${pod[@]}"
rehearse qwen3_4b_numina_math.py:rredcot,bank=rollouts "${pod[@]}"
# --slices 2: `data` goes over the network between them. Each of 4 processes stands for two hosts.
rehearse qwen3_4b_numina_math.py:rredcot --hosts 4 --devices_per_host 8 --topology v5p:2x2x4 --slices 2 \
  --config.mesh.data=2 --config.rollout_mesh.data=32 --config.rollout.prompts_per_step=4
# The recipe of the configuration's docstring for 64 chips of 16 hosts; each of 4 processes stands for four.
rehearse qwen3_4b_numina_math.py:rredcot --hosts 4 --devices_per_host 16 --topology v5e:8x8 --config.mesh.fsdp=16 \
  --config.mesh.sequence=4 --config.rollout_mesh.data=16 --config.rollout_mesh.tensor=4 --config.compute.remat=full \
  --config.compute.log_prob_chunk=1024
# More parts of rows than evaluation.rows: 256 chips, each of 4 processes for 16 hosts.
rehearse qwen3_4b_numina_math.py:grpo --hosts 4 --devices_per_host 64 --topology v5e:16x16 --config.mesh.data=16 \
  --config.rollout_mesh.data=256 --config.rollout.prompts_per_step=32
rehearse r1_distill_1p5b_open_rs.py:rredcot --hosts 2 --devices_per_host 4 --topology v5p:2x2x2
rehearse r1_distill_1p5b_open_rs.py:grpo --hosts 2 --devices_per_host 4 --topology v5p:2x2x2

# These run on one machine. Two hosts of two devices take their rows apart.
two=(--hosts 2 --devices_per_host 2)
rehearse demo.py:rredcot "${two[@]}"
rehearse demo_llm.py:rredcot "${two[@]}"
rehearse smollm2_gsm_symbolic.py:rredcot "${two[@]}"
rehearse gsm_symbolic_tiny.py "${two[@]}"
rehearse think.py "${two[@]}"
rehearse chain_comparison.py "${two[@]}"
rehearse think_comparison.py "${two[@]}"

printf '%s' "$table"
exit "$failed"
