#!/usr/bin/env bash
# What docs/ says of an H100, measured again: benchmarks/h100.sh FOLDER [GROUP ...], from the repository's root.
# Files land in FOLDER under their names in benchmarks/results/. Without a GROUP all run, but for `cuts`.
# Needs transformers, and bitsandbytes for `small` and `load`.
set -uo pipefail
[ $# -ge 1 ] || { sed -n '2,4s/^# //p' "$0"; exit 2; }
out=$1; shift; mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false
failed=0

run() { # name of the file, and what writes it
    local name=$1; shift
    echo "== $name"
    "${PYTHON:-python3}" "$@" --json "$out/$name.json" || { echo "== $name failed"; failed=1; }
}
taut() { run "$1" -m taut bench --shape llama-7b --peers sdpa "${@:2}"; }
profile() { run "profile_$1" benchmarks/profile_model.py "${@:2}"; }

sixteen() {
    taut forward_h100 --what forward,padded --lengths 512,2048,4096 --batches 1,8 --repeats 5
    taut forward_long_h100 --what forward --lengths 8192 --batches 1
    taut generate_h100 --what generate --lengths 2048 --batches 8 --repeats 2
    taut falcon_h100 --shape falcon-7b --what forward --lengths 4096 --batches 1
}
small() {
    for bits in 4 8; do
        taut decode_${bits}bit_h100 --what decode --contexts 512 --batches 1,8,32 --load-in ${bits}bit --repeats 2
        taut forward_${bits}bit_h100 --what forward --lengths 512,4096 --batches 1 --load-in ${bits}bit
    done
    profile nf4_h100 --load-in nf4 --batches 1,8,32 --lengths 512,4096
    profile int8_h100 --load-in int8 --batches 1,8,32 --lengths 512,4096
}
load() { run load_h100 benchmarks/bench_load.py; }
engine() { run engine_h100 benchmarks/bench_engine.py --within 45; }
encoder() {
    run encoder benchmarks/bench_encoder.py
    profile encoder_h100 --shape bert-base --dtype float16 --real 100,73,50,27
}
ops() {
    run attention benchmarks/bench_attention.py
    run decode_ops benchmarks/bench_decode_ops.py
    run first_token benchmarks/bench_first_token.py
}
cuts() { run cuts benchmarks/sweep_packed_rows.py; }

[ $# -gt 0 ] || set -- sixteen small load engine encoder ops
for group in "$@"; do
    case $group in
        sixteen | small | load | engine | encoder | ops | cuts) "$group" ;;
        *) echo "unknown group '$group'; known: sixteen, small, load, engine, encoder, ops, cuts"; exit 2 ;;
    esac
done
exit $failed
