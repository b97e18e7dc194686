#!/usr/bin/env bash
# What a GPU is needed for, in at most eight minutes, from the source tree: nothing is installed. First whether results
# are right there, then what they cost. Needs PyTorch and torchdiffeq; what needs more is skipped where that is missing.
#
#   OUT=results benchmarks/on_gpu.sh                 # on a machine with CUDA
#   benchmarks/on_gpu.sh --device cpu --quick        # the same code, smallest sizes, on any machine
#
# Leaves JSON, a picture and log.txt in $OUT (on_gpu by default). PYTHON names the interpreter. Each part has its own time
# limit, and the others run if it fails. Exit status: 0, 1 where a part failed or ran out of time, 2 for wrong arguments.
set -uo pipefail
out=${OUT:-on_gpu}
mkdir -p "$out" && out=$(cd "$out" && pwd) && cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

device=cuda
quick=
while (($#)); do
    case $1 in
        --device) device=${2:?--device: cpu or cuda}; shift 2 ;;
        --quick) quick=yes; shift ;;
        *) echo "$1: unknown; expected --device NAME or --quick" >&2; exit 2 ;;
    esac
done

python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
failed=()
exec > >(tee "$out/log.txt") 2>&1

has() { # whether modules can be imported
    "$python" - "$@" <<< 'import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]' 2> /dev/null
}

part() { # NAME SECONDS ARGUMENTS…: run a script on the device, its JSON in $out
    local name=$1 limit=$2 start=$SECONDS status=0
    shift 2
    printf '\n=== %s, at most %s s\n' "$name" "$limit"
    timeout --kill-after=5 "$limit" "$python" "benchmarks/$name.py" --device "$device" --json "$out/$name.json" "$@" \
        || status=$?
    ((status == 124 || status == 137)) && echo "$name: stopped after $limit s"
    ((status == 0)) || failed+=("$name (exit status $status)")
    echo "=== $name took $((SECONDS - start)) s"
}

if [[ -n $quick ]]; then
    few=(--rounds 1 --budget 0)
    sizes=(6,2,8)
    peer_sizes=(6,2,8)
    check=(--quick --processes 2)
else
    few=(--rounds 10 --budget 12)
    sizes=(16,3,128 64,3,1024 324,8,4096)
    peer_sizes=(64,3,1024)
    check=(--budget 55 --processes $((($(nproc) + 1) / 2)))
fi

command -v nvidia-smi > /dev/null && nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
part check_device 90 "${check[@]}"
part solver_cost 120 --sizes "${sizes[@]}" --methods euler rk4 dopri5 "${few[@]}" --plot "$out/solver_cost.png"
part against_peers 80 --sizes "${peer_sizes[@]}" --libraries cflow torchdiffeq torchdyn torchode zuko diffrax "${few[@]}"
part user_module 40 --quick "${few[@]:0:2}" --budget 5 # its larger cases take minutes where launches count
if [[ -z $quick ]]; then # its programs take half a minute to compile
    part compiled_field 100 --step --size 16,3,128 --rounds 10 --budget 5
fi
presets=(digits mnist)
if ! has sklearn; then
    presets=(mnist)
    echo "skipped the preset digits: scikit-learn cannot be imported"
fi
if has cflow.training.module yaml torchvision; then
    part training_iteration 50 --presets "${presets[@]}" "${few[@]:0:2}"
else
    echo "skipped training_iteration: cflow's extra 'train' cannot be imported"
fi

printf '\n'
if ((${#failed[@]})); then
    printf 'FAILED: %s\n' "${failed[@]}"
    exit 1
fi
echo "all parts ran, in $SECONDS s; results in $out"
