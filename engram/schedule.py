"""Learning-rate schedules as a factor on the peak: a pure function of the step, so that resuming needs no state."""

from __future__ import annotations

import math
from typing import assert_never

from engram.config import OptimConfig


def lr_factor(step: int, total_steps: int, config: OptimConfig) -> float:
    """Return the factor on the peak learning rate at a step.

    Args:
        step: 0 for the first.
        total_steps: steps of the whole run.
        config: `schedule` is "step" (DeepSeek-LLM, arXiv 2401.02954: x0.316 from 80 percent, x0.1 from 90), "cosine"
            (down to final_lr_frac) or "wsd" (constant, then linear to final_lr_frac). All warm up linearly.
    """
    assert 0 <= step < total_steps, f"step {step} is outside a run of {total_steps} steps"
    warmup = round(config.warmup_frac * total_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    low = config.final_lr_frac
    match config.schedule:
        case "step":
            done = step / total_steps
            return 1.0 if done < 0.8 else 0.316 if done < 0.9 else 0.1
        case "cosine":
            # The last step is at 1, so that the final factor is reached.
            done = (step - warmup) / max(1, total_steps - 1 - warmup)
            return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done))
        case "wsd":
            decay_steps = max(1, round(config.wsd_decay_frac * total_steps))
            left = total_steps - 1 - step
            return low + (1 - low) * min(1.0, left / decay_steps)
        case unknown:
            assert_never(unknown)
