"""Learning rates over steps, counted as Megatron-LM counts them: step 0 is the first, and warm-up starts from 0."""

from __future__ import annotations

import math

from mbx.train.recipe.sections import Optim

#: Part of a WSD schedule that decays, where `optim.decay_steps` does not say (arXiv 2404.06395 uses 10 %).
_WSD_DECAY = 0.1


def warmup_steps(optim: Optim, num_steps: int) -> int:
    """Steps of linear warm-up in a run of `num_steps`."""
    return optim.warmup_steps if optim.warmup_steps >= 0 else round(optim.warmup_fraction * num_steps)


def learning_rate(optim: Optim, step: int, num_steps: int) -> float:
    """Learning rate of 0-based `step` in a run of `num_steps`.

    Warm-up is linear from 0 over `warmup_steps(optim, num_steps)`. `cosine` and `linear` then fall to `min_lr` at
    `decay_steps` (default: the whole run) and stay there; `wsd` holds and falls linearly over the last
    `decay_steps` (default: a tenth); `constant` holds. Formulas: megatron/core/optimizer_param_scheduler.py.
    """
    warmup = warmup_steps(optim, num_steps)
    if step < warmup:
        return optim.lr * step / warmup
    if optim.schedule == "constant":
        return optim.lr
    if optim.schedule == "wsd":
        decay = optim.decay_steps or max(1, round(num_steps * _WSD_DECAY))
        done = (step - (num_steps - decay)) / decay
        return optim.lr - (optim.lr - optim.min_lr) * min(1.0, max(0.0, done))
    decay = (optim.decay_steps or num_steps) - warmup
    done = min(1.0, (step - warmup) / decay) if decay > 0 else 1.0
    share = 1.0 - done if optim.schedule == "linear" else 0.5 * (math.cos(math.pi * done) + 1.0)
    return optim.min_lr + share * (optim.lr - optim.min_lr)
