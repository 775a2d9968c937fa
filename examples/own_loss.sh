#!/usr/bin/env bash
# Train on a loss of your own: hard tokens count more, and a line a step says how hard they were.
set -euo pipefail
llama="$(cd "$(dirname "$0")/.." && pwd)/fixtures/tiny/llama"

cat > own.py <<'END'
def token_losses(losses, batch):
    """A focal loss: what the model is sure of hardly counts."""
    return losses * (1 - (-losses).exp()) ** 2


def on_step(step):
    print(f"step {step.step}: {step.loss:.3f}")


def on_save(folder):
    print("saved", folder.name)
END
mbx train llama32_1b_lora "model=$llama" data.kind=pattern data.length=64 train.global_batch=4 steps=6 lr=3e-3 \
  run.dir=run run.save_every=3 --hooks own.py
