"""How fast a finished model reads and writes, and what memory that takes: prefill and decode, as a server would see it.

A model with n-gram tables is measured twice: with its tables on the device, and with them in host memory, where each
call brings the rows that it reads. The logits are the same to the bit. On a CPU both places are the same memory, and
what differs is the work of bringing rows.

    results/runs/r0123456789/evals/speed_cpu_tables-host_threads-1_batch-8_prompt-128_new-64.speed

Every model and place is measured in a process of its own, whose memory is then only theirs.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engram.decoding import DecodeState
from engram.transformer import Transformer
from experiments.final import cpu_name
from experiments.finished import Finished, open_finished
from experiments.peak_memory import Peak, peak_of_process, peak_since, resident, restart_peak
from experiments.rundir import provenance
from experiments.settings import UserError

REPEATS = 5
PLACES = ("device", "host")
"""Where n-gram tables may lie."""


@dataclass(frozen=True)
class Load:
    """What a model is asked to do, and with what."""

    device: str = "cpu"
    threads: int = 1
    batch: int = 8
    """Sequences at once."""
    prompt: int = 128
    """Tokens read at once."""
    new: int = 64
    """Tokens written one by one."""


def parse_places(text: str) -> tuple[str, ...]:
    """Where the tables are to lie, from words joined by commas; each once.

    Raises:
        UserError: it names none, or another.
    """
    places = tuple(dict.fromkeys(place.strip() for place in text.split(",") if place.strip()))
    if not places or set(places) - set(PLACES):
        raise UserError(f"--tables={text}: take {' or '.join(PLACES)}, or {','.join(PLACES)} for one after the other")
    return places


def measure_all(
    runs: Sequence[Finished], data_dir: Path, load: Load, places: Sequence[str]
) -> Iterator[tuple[Finished, dict[str, Any]]]:
    """Measure every run, one after another, and keep what was found beside its scores.

    Args:
        runs: finished ones.
        data_dir: where their shards lie.
        load: what they are asked to do.
        places: "device", "host", or both: where tables lie. A run without tables is measured once.
    """
    for finished in runs:
        for place in places if finished.run.spec.model.memory is not None else (None,):
            # spawn: a child made by fork would begin with this process's memory.
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                result = pool.submit(_measure, finished.run_dir.path, data_dir, load, place).result()
            (evals := finished.run_dir.path / "evals").mkdir(exist_ok=True)
            path = evals / _file_name(load, place)
            (draft := path.with_suffix(".part")).write_text(json.dumps(result) + "\n")
            draft.replace(path)
            yield finished, result


def in_words(result: dict[str, Any]) -> str:
    """One line: speeds, peaks of memory, and what the model itself takes."""
    where = {None: "", "device": "tables on the device, ", "host": "tables in host memory, "}[result["tables_on"]]
    peaks = [
        f"{memory} memory {_mib(result[f'prefill_{memory}_bytes'])} in prefill, "
        f"{_mib(result[f'decode_{memory}_bytes'])} in decode"
        for memory in ("device", "host")
        if result[f"decode_{memory}_bytes"] is not None
    ]
    return (
        f"{where}prefill {result['prefill_tokens_per_s']:,.0f} tokens/s, "
        f"decode {result['decode_tokens_per_s']:,.0f} tokens/s, "
        f"{'; '.join(peaks) or 'process ' + _mib(result['process_host_bytes']) + ' at most'} "
        f"(weights {_mib(result['weights_bytes'])}, of these tables {_mib(result['tables_bytes'])}, "
        f"past {_mib(result['state_bytes'])})"
    )


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:,.1f} MiB"


def _file_name(load: Load, place: str | None) -> str:
    kind = torch.device(load.device).type
    size = f"threads-{load.threads}_batch-{load.batch}_prompt-{load.prompt}_new-{load.new}"
    return f"speed_{kind}_tables-{place or 'none'}_{size}.speed"


def _measure(run: Path, data_dir: Path, load: Load, place: str | None) -> dict[str, Any]:
    torch.set_num_threads(load.threads)
    device = torch.device(load.device)
    torch.zeros(1, device=device)  # a GPU's context is none of the model's memory
    before = resident()
    finished = open_finished(run, data_dir)
    model = finished.load_model(tables_stay=place == "host").to(device)
    seconds = [_seconds(model, load) for _ in range(REPEATS + 1)][1:]  # the first one warms up
    prefill_s, decode_s = (median(each) for each in zip(*seconds, strict=True))
    ever = peak_of_process()
    prefill, decode, state_bytes = _peaks(model, load)
    facts = provenance()
    sizes = {name: p.numel() * p.element_size() for name, p in model.named_parameters()}
    return {
        "run_id": finished.run.spec.run_id,
        **asdict(load),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "host_cpu": cpu_name(),
        "dtype": str(model.embed_VD.dtype).removeprefix("torch."),
        "tables_on": place,
        "prefill_tokens_per_s": round(load.batch * load.prompt / prefill_s, 1),
        "decode_tokens_per_s": round(load.batch * load.new / decode_s, 1),
        "prefill_device_bytes": prefill.device,
        "decode_device_bytes": decode.device,
        "prefill_host_bytes": prefill.host,
        "decode_host_bytes": decode.host,
        "before_host_bytes": before,
        "process_host_bytes": max(ever, peak_of_process(), prefill.host or 0),
        "weights_bytes": sum(sizes.values()),
        "tables_bytes": sum(size for name, size in sizes.items() if name.endswith("table_SP")),
        "state_bytes": state_bytes,
        "repeats": REPEATS,
        "commit": facts["commit"],
        "dirty": facts["dirty"],
        "torch": torch.__version__,
    }


@torch.inference_mode()
def _seconds(model: Transformer, load: Load) -> tuple[float, float]:
    """Of reading a prompt, and of going on from it."""
    device = model.embed_VD.device

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    tokens_BT, state = _prompt(model, load), DecodeState(model.config)
    began = now()
    last_B1 = _read(model, tokens_BT, state)
    read = now()
    _go_on(model, last_B1, state, load.new)
    return read - began, now() - read


@torch.inference_mode()
def _peaks(model: Transformer, load: Load) -> tuple[Peak, Peak, int]:
    """Of the same two, apart from the timing, which starting the mark again would slow; and bytes of the past."""
    device = model.embed_VD.device
    tokens_BT, state = _prompt(model, load), DecodeState(model.config)
    restarted = restart_peak(device)
    last_B1 = _read(model, tokens_BT, state)
    prefill = peak_since(device, restarted=restarted)
    restarted = restart_peak(device)
    _go_on(model, last_B1, state, load.new)
    return prefill, peak_since(device, restarted=restarted), state.n_bytes


def _prompt(model: Transformer, load: Load) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(model.config.vocab_size, (load.batch, load.prompt), generator=generator)
    return tokens_BT.to(model.embed_VD.device)


def _read(model: Transformer, tokens_BT: Tensor, state: DecodeState) -> Tensor:
    # Only the last token's logits, as a server does: those of a whole prompt are the largest tensor there is.
    return F.linear(model.hidden(tokens_BT, state=state)[:, -1:], model.head_VD).argmax(-1)


def _go_on(model: Transformer, last_B1: Tensor, state: DecodeState, new: int) -> None:
    """Greedily."""
    for _ in range(new):
        last_B1 = model(last_B1, state=state).argmax(-1)
