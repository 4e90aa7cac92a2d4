#!/bin/sh
# Tests the method on this machine's accelerator, and measures it, within 9 minutes.
#
#     benchmarks/on_accelerator.sh [--small] [DIRECTORY]
#
# Needs jax for the accelerator, flax, optax, orbax-checkpoint, jaxtyping, PyTorch, pytest,
# pytest-xdist and hypothesis, and no TensorFlow, data set or web. Where constriction is missing, the codec is left
# out. Writes accelerator.json, accelerator.md and accelerator_tests.txt into DIRECTORY (by default
# results). Each part has a time of its own; a second call goes on with what is not done.
# --small: sizes that a CPU can do, to try the script itself.
set -u
cd "$(dirname "$0")/.."
sizes='' steps='--repeats=5 --min-seconds=0.3' small=''
if [ "${1-}" = --small ]; then
    small=yes
    sizes='--batch-size=2 --image-size=32' steps='--repeats=2 --min-seconds=0'
    shift
fi
directory=${1:-results}
output=$directory/accelerator.json
tests=$directory/accelerator_tests.txt
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 LLVQ_TEST_DEVICES=default XLA_PYTHON_CLIENT_PREALLOCATE=false
failed=''

# part SECONDS COMMAND…: a command that is stopped after so many seconds.
part() {
    seconds=$1
    shift
    echo "== $* (at most $seconds s)"
    timeout --signal=INT --kill-after=10 "$seconds" "$@"
    status=$?
    if [ $status -ne 0 ]; then
        echo "== not done (status $status); the same command goes on"
        failed=yes
    fi
}

# Golden numbers, which need the authors' files; float64 references; packed and plain images; calls of
# several steps and of one; convolutions in every form.
method="test_golden test_packing test_feeding test_model test_convolution test_codebooks
test_scalar_quantizers test_rate_lattices test_nearest_point"
if [ ! -f "$tests" ]; then
    [ "$small" ] && method="test_golden test_nearest_point"
    # shellcheck disable=SC2046
    part 110 "$python" -m pytest -q -p no:cacheprovider -n 8 --tb=short \
        $(printf 'tests/%s.py ' $method) >"$tests.part" 2>&1
    tail -n 3 "$tests.part"
    [ $status -eq 0 ] && mv "$tests.part" "$tests"
fi

compare="$python benchmarks/train_step.py --resume --output=$output $steps $sizes"
# shellcheck disable=SC2086
{
    part 170 $compare --datasets ffhq1024 celeba --quantizers sparse_lattice --steps train
    part 70 $compare --datasets fashion_mnist --quantizers sparse_lattice --steps train
    part 45 "$python" benchmarks/start.py --resume --output="$output" --repeats=1 \
        --datasets fashion_mnist
    part 50 "$python" benchmarks/quantizer.py --resume --output="$output" $steps \
        --without-package --quantizers vq fsq lfq sparse_lattice e8_lattice \
        --codebook-sizes 1024 65536 --vectors $([ "$small" ] && echo 2048 || echo 2097152)
    if "$python" -c 'import constriction' 2>/dev/null; then
        part 30 $compare --datasets ffhq1024 fashion_mnist --quantizers sparse_lattice \
            --steps encode decode
    fi
    part 60 $compare --datasets ffhq1024 --quantizers vq sparse_lattice --steps evaluate train
}
echo "== $output and ${output%.json}.md have what was measured"
[ -z "$failed" ]
