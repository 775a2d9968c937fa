#!/usr/bin/env bash
# Train a tiny model on sequences that count, draw its report, and take what it learned home.
set -euo pipefail
llama="$(cd "$(dirname "$0")/.." && pwd)/fixtures/tiny/llama"

mbx train llama32_1b_lora "model=$llama" data.kind=pattern data.length=64 train.global_batch=4 steps=8 lr=3e-3 run.dir=run
mbx train report run
mbx train export run adapter
mbx inspect adapter
