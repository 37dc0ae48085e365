#!/usr/bin/env bash
# Runs one program on TPU slices of a GKE cluster: as a JobSet through kubectl, or through XPK. See docs/tpu_pods.md.
set -euo pipefail

usage() {
  cat <<'END'
usage: tools/launch_gke.sh --name NAME --image IMAGE --accelerator TYPE --topology TxT [OPTION ...] -- PROGRAM ...

PROGRAM is experiments/train.py and its flags. Its --workdir must lie under --mount, so that every worker and every
later start finds it.

  --name NAME           of the run; lower case letters, digits and -
  --image IMAGE         with the tree in its working directory and everything installed
  --accelerator TYPE    the node pool's label, such as tpu-v5p-slice or tpu-v5-lite-podslice
  --topology T          of a slice, such as 2x2x4
  --chips N             of a worker (default 4)
  --slices N            (default 1)
  --claim NAME          a PersistentVolumeClaim that many may write (Filestore, or a bucket by Cloud Storage FUSE)
  --mount PATH          where it is mounted (default /runs)
  --restarts N          after which the JobSet gives up (default 100)
  --grace SECONDS       between SIGTERM and the end (default 300)
  --xpk CLUSTER         print and run `xpk workload create` on that cluster instead of a JobSet of ours
  --tpu-type TYPE       for --xpk, such as v5p-32, in place of --accelerator and --topology
  --dry-run             print what would be applied or run, and do nothing
END
}

fail() {
  echo "launch_gke.sh: $1 (see --help)" >&2
  exit 2
}

name="" image="" accelerator="" topology="" chips=4 slices=1 claim="" mount=/runs restarts=100 grace=300 xpk=""
tpu_type="" dry="" program=()
while (($#)); do
  case "$1" in
    -h | --help) usage; exit 0 ;;
    --dry-run) dry=1 ;;
    --) shift; program=("$@"); break ;;
    --name | --image | --accelerator | --topology | --chips | --slices | --claim | --mount | --restarts | --grace | --xpk | --tpu-type)
      (($# > 1)) || fail "$1 needs a value"
      variable="${1#--}"
      printf -v "${variable//-/_}" %s "$2"
      shift ;;
    *) fail "unknown option $1" ;;
  esac
  shift
done

# matches OPTION VALUE PATTERN: what goes into YAML is checked, not escaped.
matches() {
  [[ "$2" =~ ^$3$ ]] || fail "--$1 '$2' does not match $3"
}
((${#program[@]})) || fail "-- and a program are needed"
for word in "${program[@]}"; do
  [[ "$word" != *[[:cntrl:]]* ]] || fail "the program has a control character in ${word@Q}"
done
matches name "$name" '[a-z]([a-z0-9-]{0,38}[a-z0-9])?'
matches image "$image" '[A-Za-z0-9][A-Za-z0-9._/:@-]*'
matches slices "$slices" '[1-9][0-9]*'
# A run that is told to stop, or that lost another process, ends with a status that has it started again.
program+=(--distributed --stopped_status 75)

if [[ -n "$xpk" ]]; then
  matches xpk "$xpk" '[a-z][a-z0-9-]*'
  matches tpu-type "$tpu_type" '[a-z0-9-]+'
  # As in the JobSet below.
  command="env RREDCOT_START_SECONDS=600 python"
  for word in "${program[@]}"; do command+=" ${word@Q}"; done
  call=(xpk workload create --cluster "$xpk" --workload "$name" --tpu-type "$tpu_type" --num-slices "$slices"
    --docker-image "$image" --max-restarts "$restarts" --command "$command")
  if [[ -n "$dry" ]]; then
    printf '%s ' "${call[@]@Q}"
    echo
    exit
  fi
  exec "${call[@]}"
fi

matches accelerator "$accelerator" 'tpu-[a-z0-9-]+'
matches topology "$topology" '[0-9]+(x[0-9]+){1,2}'
matches chips "$chips" '[1-9][0-9]*'
matches restarts "$restarts" '[0-9]+'
matches grace "$grace" '[0-9]+'
matches mount "$mount" '/[A-Za-z0-9._/-]+'
matches claim "$claim" '[a-z0-9]([a-z0-9.-]*[a-z0-9])?'
workers=$((${topology//x/*} / chips))
((workers > 0 && workers * chips == ${topology//x/*})) || fail "--topology $topology is not a multiple of --chips $chips"

# json_string TEXT: a JSON string, which YAML reads unchanged. $ is doubled, because Kubernetes expands $(NAME).
json_string() {
  local text="$1"
  text="${text//\\/\\\\}"
  text="${text//\"/\\\"}"
  printf '"%s"' "${text//'$'/'$$'}"
}

manifest() {
  cat <<END
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: $restarts
  replicatedJobs:
  - name: slice
    replicas: $slices
    template:
      spec:
        parallelism: $workers
        completions: $workers
        completionMode: Indexed
        backoffLimit: 0
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: $grace
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: $accelerator
              cloud.google.com/gke-tpu-topology: $topology
            containers:
            - name: train
              image: $image
              env:
              # Workers wait for each other. The minute of the default is short where one has to pull the image.
              - name: RREDCOT_START_SECONDS
                value: "600"
              command:
              - python
END
  for word in "${program[@]}"; do
    echo "              - $(json_string "$word")"
  done
  cat <<END
              resources:
                limits:
                  google.com/tpu: $chips
              volumeMounts:
              - name: runs
                mountPath: $mount
            volumes:
            - name: runs
              persistentVolumeClaim:
                claimName: $claim
END
}

rendered="$(manifest)"
if [[ -n "$dry" ]]; then
  printf '%s\n' "$rendered"
else
  kubectl apply -f - <<<"$rendered"
fi
