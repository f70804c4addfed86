"""How fast a finished model reads and writes, and what memory that takes: prefill and decode, as a server would see it.

Every model is measured in a process of its own, since a process's peak memory never falls again.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import torch

from engram.decoding import DecodeState
from engram.transformer import Transformer
from experiments.finished import Finished, open_finished

REPEATS = 5


def measure_all(runs: Sequence[Finished], data_dir: Path, device: str, batch: int, prompt: int, new: int) -> list[Any]:
    """Measure every run, one after another, and keep what was found beside its scores.

    Args:
        runs: finished ones.
        data_dir: where their shards lie.
        device: "cpu" or "cuda".
        batch: sequences at once.
        prompt: tokens read at once.
        new: tokens written one by one.
    """
    found = []
    for finished in runs:
        # spawn: a child made by fork would begin with this process's memory.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            job = (finished.run_dir.path, data_dir, device, batch, prompt, new, torch.get_num_threads())
            result = {"run_id": finished.run.spec.run_id, **pool.submit(_measure, *job).result()}
        (evals := finished.run_dir.path / "evals").mkdir(exist_ok=True)
        path = evals / f"speed_{device}_batch-{batch}_prompt-{prompt}_new-{new}.speed"
        (draft := path.with_suffix(".part")).write_text(json.dumps(result) + "\n")
        draft.replace(path)
        found.append(result)
    return found


def _measure(run: Path, data_dir: Path, device: str, batch: int, prompt: int, new: int, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    model = open_finished(run, data_dir).load_model().to(device)
    timings = [_once(model, batch, prompt, new) for _ in range(REPEATS + 1)][1:]  # the first one warms up
    prefill, decode = (median(seconds) for seconds in zip(*((p, d) for p, d, _ in timings), strict=True))
    on_gpu = torch.device(device).type == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    tables = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if name.endswith("table_SP"))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return {
        "prefill_tokens_per_s": round(batch * prompt / prefill, 1),
        "decode_tokens_per_s": round(batch * new / decode, 1),
        "peak_memory_bytes": peak,
        "weights_bytes": weights,
        "tables_bytes": tables,
        "tables_on": device,
        "state_bytes": timings[-1][2],
        "batch": batch,
        "prompt": prompt,
        "new": new,
        "repeats": REPEATS,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "threads": threads,
        "torch": torch.__version__,
    }


@torch.no_grad()
def _once(model: Transformer, batch: int, prompt: int, new: int) -> tuple[float, float, int]:
    """Seconds of prefill and of decode, and bytes of the state in the end; greedy, from random text."""
    device = model.embed_VD.device
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(model.config.vocab_size, (batch, prompt), generator=generator).to(device)
    state = DecodeState(model.config)

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    start = now()
    last_B1 = model(tokens_BT, state=state)[:, -1:].argmax(-1)
    read = now()
    for _ in range(new):
        last_B1 = model(last_B1, state=state).argmax(-1)
    return read - start, now() - read, state.n_bytes
