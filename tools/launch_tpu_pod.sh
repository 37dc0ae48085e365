#!/usr/bin/env bash
# Runs one program on every worker of a TPU pod slice, or of any list of hosts, by plain ssh. See docs/tpu_pods.md.
set -euo pipefail

usage() {
  cat <<'END'
usage: tools/launch_tpu_pod.sh ACTION (--tpu NAME --zone ZONE [--project ID] | --hosts A,B,...) [OPTION ...] [-- PROGRAM ...]

actions
  setup   copy the committed tree to every worker and install it there
  run     start PROGRAM (experiments/train.py and its flags) on every worker, detached; it outlives the connection
  logs    the end of every worker's output
  stop    SIGTERM to every worker's program: it saves a checkpoint and ends

options
  --tpu, --zone, --project   a TPU VM, reached by gcloud; JAX finds the workers of its slice by itself
  --hosts A,B,...            hosts reached by ssh (user@host works); the first is process 0
  --port N                   of process 0, for --hosts (default 8476)
  --directory DIR            the tree on the workers, under the home directory (default rredcot-jax)
  --python NAME              Python 3.11 or newer on the workers, for setup (default python3.11)
  --install WHAT             passed to pip beside the tree, for setup (default jax[tpu])
  --env NAME=VALUE           a variable of the program's environment; may be repeated
  --dry-run                  print what would run, one command a line, and run nothing
END
}

fail() {
  echo "launch_tpu_pod.sh: $1 (see --help)" >&2
  exit 2
}

action="" tpu="" zone="" project="" hosts="" port=8476 directory=rredcot-jax python=python3.11 install='jax[tpu]' dry=""
variables=() program=()
while (($#)); do
  case "$1" in
    -h | --help) usage; exit 0 ;;
    --dry-run) dry=1 ;;
    --) shift; program=("$@"); break ;;
    --tpu | --zone | --project | --hosts | --port | --directory | --python | --install | --env)
      (($# > 1)) || fail "$1 needs a value"
      case "$1" in
        --env) [[ "$2" =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || fail "--env $2 is not NAME=VALUE"; variables+=("$2") ;;
        *) printf -v "${1#--}" %s "$2" ;;
      esac
      shift ;;
    -*) fail "unknown option $1" ;;
    *) [[ -z "$action" ]] || fail "two actions, $action and $1"; action="$1" ;;
  esac
  shift
done
[[ "$action" =~ ^(setup|run|logs|stop)$ ]] || fail "the action '$action' is none of setup, run, logs, stop"
if [[ -n "$tpu" ]]; then
  [[ -z "$hosts" ]] || fail "--tpu and --hosts exclude each other"
  [[ -n "$zone" ]] || fail "--tpu needs --zone"
else
  [[ -n "$hosts" ]] || fail "--tpu or --hosts is needed"
fi
[[ "$directory" =~ ^[A-Za-z0-9._/-]+$ && "$directory" != -* ]] || fail "--directory '$directory' must be a plain path"
[[ "$port" =~ ^[0-9]+$ ]] || fail "--port '$port' must be a number"
if [[ "$action" == run ]]; then
  ((${#program[@]})) || fail "run needs -- and a program"
else
  ((${#program[@]} == 0)) || fail "$action takes no program"
fi

# Words as one line that a shell reads back as the same words.
quoted() {
  local word line=""
  for word in "$@"; do
    [[ "$word" =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word="${word@Q}"
    line+=" $word"
  done
  printf %s "${line# }"
}

execute() {
  if [[ -n "$dry" ]]; then
    quoted "$@"
    echo
  else
    "$@"
  fi
}

gcloud_place=(--zone "$zone" --worker all)
[[ -z "$project" ]] || gcloud_place+=(--project "$project")
IFS=, read -r -a host_list <<<"$hosts"

# on_workers COMMAND: a shell line, run on every worker. Hosts are told which process they are; on a TPU JAX finds out.
on_workers() {
  if [[ -n "$tpu" ]]; then
    execute gcloud compute tpus tpu-vm ssh "$tpu" "${gcloud_place[@]}" --command "$1"
    return
  fi
  local index line running=() status=0
  for index in "${!host_list[@]}"; do
    line="export JAX_COORDINATOR_ADDRESS=${host_list[0]#*@}:$port JAX_NUM_PROCESSES=${#host_list[@]} JAX_PROCESS_ID=$index; $1"
    if [[ -n "$dry" ]]; then
      execute ssh "${host_list[$index]}" "$line"
    else
      # shellcheck disable=SC2029 # It is complete here, and quoted for the shell there.
      (ssh "${host_list[$index]}" "$line" </dev/null 2>&1 | sed "s/^/[$index] /") &
      running+=("$!")
    fi
  done
  for index in "${running[@]}"; do
    wait "$index" || status=1
  done
  return "$status"
}

case "$action" in
  setup)
    archive=rredcot-jax.tar.gz
    local_archive="${TMPDIR:-/tmp}/$archive"
    execute git archive --format tar.gz --output "$local_archive" HEAD
    if [[ -n "$tpu" ]]; then
      execute gcloud compute tpus tpu-vm scp "$local_archive" "$tpu:$archive" "${gcloud_place[@]}"
    else
      for host in "${host_list[@]}"; do execute scp "$local_archive" "$host:$archive"; done
    fi
    on_workers "set -e; mkdir -p $directory; tar xzf $archive -C $directory; cd $directory; \
$(quoted "$python") -m venv .venv; .venv/bin/python -m pip install --quiet -e '.[experiments]' $(quoted "$install")"
    ;;
  run)
    [[ -z "$tpu" ]] || program+=(--distributed)
    started="$(quoted .venv/bin/python "${program[@]}")"
    ((${#variables[@]} == 0)) || started="env $(quoted "${variables[@]}") $started"
    # shellcheck disable=SC2016 # For the shell there.
    alive='test -e run.pid && kill -0 "$(cat run.pid)" 2>/dev/null'
    on_workers "cd $directory || exit; if $alive; then echo already running; exit 1; fi; \
nohup $started >>run.log 2>&1 </dev/null & echo \$! >run.pid; echo started"
    ;;
  logs) on_workers "tail -n 20 $directory/run.log" ;;
  stop) on_workers "kill -TERM \"\$(cat $directory/run.pid)\"" ;;
esac
