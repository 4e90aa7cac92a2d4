#!/bin/sh
# Sets up, gets the data, trains, evaluates and shows the results. A second call skips what is done
# and resumes what was stopped.
set -eu
cd "$(dirname "$0")"
. ./input_pipeline/debian_package.sh

usage() {
    cat <<'END'
usage: ./run.sh [--quick] [--recipe=RECIPE] [--seeds=SEED,…] [DATA SET …] [QUANTIZER …]
       ./run.sh --setup

Trains each quantizer on each data set (by default sparse_lattice on fashion_mnist) and evaluates
it, in runs/DATA SET/RECIPE/QUANTIZER/seed_SEED.

  DATA SET   a file of configs/, e.g. celeba
  QUANTIZER  of llvq/quantizers/registry.py, e.g. vq
  --quick    only 200 steps, in runs/quick/…
  --recipe   of llvq/config.py; by default paper
  --seeds    by default 0; with this option, results/README.md is written anew from the runs
  --setup    only make .venv and get FashionMNIST
END
}

say() { printf '\n== %s\n' "$*"; }

find_python() {
    for candidate in python3 python3.13 python3.12 python3.11 python; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "run.sh: needs Python 3.11, 3.12 or 3.13" >&2
    exit 1
}

make_venv() {
    cat llvq/requirements.txt llvq/train-requirements.txt requirements.txt | cmp -s - .venv/requirements.installed && return
    python=$(find_python)
    say "Making .venv with $("$python" --version) and installing requirements.txt"
    if ! "$python" -m venv .venv; then
        echo "run.sh: $python cannot make a virtual environment (Debian: install python3-venv)" >&2
        exit 1
    fi
    .venv/bin/python -m pip install --quiet --requirement requirements.txt
    cat llvq/requirements.txt llvq/train-requirements.txt requirements.txt >.venv/requirements.installed
}

# Gets FashionMNIST from Debian's package mirror, without root; elsewhere TFDS downloads it.
get_fashion_mnist() {
    data_dir=${TFDS_DATA_DIR:-$HOME/tensorflow_datasets}
    manual_dir=$data_dir/downloads/manual/fashion_mnist
    if [ -d "$data_dir/fashion_mnist" ] || [ -d "$manual_dir" ] ||
        [ -d /usr/share/datasets/fashion-mnist ] || ! command -v apt-get >/dev/null; then
        return
    fi
    say "Getting FashionMNIST (30 MB) from the package mirror"
    mkdir -p "$(dirname "$manual_dir")"
    # Beside its place, so that the move is all or nothing.
    temporary=$(mktemp -d "$manual_dir.XXXXXX")
    if (cd "$temporary" && download_debian_package dataset-fashion-mnist); then
        mv "$temporary/usr/share/datasets/fashion-mnist" "$manual_dir"
    else
        echo "No such package there; it will be downloaded from the web."
    fi
    rm -rf "$temporary"
}

# Whether a run is evaluated already: its newest checkpoint is older than the evaluation.
is_evaluated() {
    [ -f "$1/evaluation.json" ] &&
        [ -z "$(find "$1/checkpoints" -mindepth 1 -maxdepth 1 -newer "$1/evaluation.json")" ]
}

# Sorts names into data sets and quantizers. A name that is neither, or an unknown recipe, ends the
# program.
sort_names() {
    known=$(.venv/bin/python -c '
from llvq import config, quantizers
print(*(f"quantizer:{name}" for name in quantizers.QUANTIZERS), end=" ")
print(*(f"recipe:{name}" for name in config.RECIPES))')
    known=" $known "
    case $known in
    *" recipe:$recipe "*) ;;
    *) echo "run.sh: no recipe is called $recipe" >&2 && exit 2 ;;
    esac
    for name; do
        case $known in
        *" quantizer:$name "*) quantizers="$quantizers $name" ;;
        *)
            if [ ! -f "configs/$name.py" ] || [ "$name" = default ]; then
                echo "run.sh: no data set or quantizer is called $name" >&2
                exit 2
            fi
            datasets="$datasets $name"
            ;;
        esac
    done
}

workdir() { echo "$runs/$1/$recipe/$2/seed_$3"; }

run() {
    config=configs/$1.py:$2,$recipe
    workdir=$(workdir "$@")
    say "Training $2 on $1 in $workdir"
    # shellcheck disable=SC2086
    .venv/bin/python main.py --config="$config" --config.seed="$3" --workdir="$workdir" $overrides
    if ! is_evaluated "$workdir"; then
        say "Evaluating $workdir"
        .venv/bin/python main.py --workdir="$workdir" --mode=evaluate
    fi
}

# Calls a function for every data set, quantizer and seed.
for_each() {
    for dataset in ${datasets:-fashion_mnist}; do
        for quantizer in ${quantizers:-sparse_lattice}; do
            for seed in ${seeds:-0}; do
                "$1" "$dataset" "$quantizer" "$seed"
            done
        done
    done
}

names='' datasets='' quantizers='' seeds='' recipe=paper overrides='' runs=runs only_set_up=''
for argument; do
    case $argument in
    --quick) overrides=--config.num_train_steps=200 runs=runs/quick ;;
    --setup) only_set_up=yes ;;
    --recipe=*) recipe=${argument#*=} ;;
    --seeds=*) seeds=$(echo "${argument#*=}" | tr , ' ') ;;
    --help | -h) usage && exit ;;
    -*) usage >&2 && exit 2 ;;
    *) names="$names $argument" ;;
    esac
done

make_venv
if [ -z "$only_set_up" ]; then
    # shellcheck disable=SC2086
    sort_names $names
fi
case "$datasets" in
'' | *fashion_mnist*) get_fashion_mnist ;;
esac
[ "$only_set_up" ] && exit
for_each run
say "Results"
# shellcheck disable=SC2046
.venv/bin/python -m results.summary $(for_each workdir)
if [ "$seeds" ]; then
    say "Collecting results"
    .venv/bin/python -m results.collect "$runs"
fi
