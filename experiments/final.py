"""What final.json holds: `result`, which an equal run would find again to the bit, and `cost`, which it would not."""

from __future__ import annotations

import math
import platform
from pathlib import Path
from typing import Any, Literal

import torch

from engram.counting import count_params, train_flops_per_token
from experiments.peak_memory import peak_of_process
from experiments.rundir import RunDir, provenance
from experiments.runlogs import attempt_seconds
from experiments.settings import Run
from experiments.trainer import Trainer

Status = Literal["final", "diverged"]


def write_final(
    run: Run, run_dir: RunDir, trainer: Trainer, status: Status, line: dict[str, Any], valid: dict[str, Any] | None
) -> None:
    """End a run.

    Args:
        run: spec and labels.
        run_dir: its directory.
        trainer: after its last step.
        status: how it ended.
        line: metrics of the last training step.
        valid: metrics of the last validation; None for a run that diverged.
    """
    result = _result(run, trainer, line, valid)
    run_dir.write_final({"status": status, "result": result, "cost": _cost(run_dir, trainer)})


def _result(run: Run, trainer: Trainer, line: dict[str, Any], valid: dict[str, Any] | None) -> dict[str, Any]:
    spec, labels = run.spec, run.labels
    model, counts = spec.model, count_params(spec.model)
    tokens = trainer.step * spec.train.batch_tokens
    flops_per_token = train_flops_per_token(model, spec.train.seq_len)
    return {
        "run_id": spec.run_id,
        "schema": spec.schema,
        "budget": labels.budget,
        "budget_hash": labels.budget_hash,
        "suite": labels.suite,
        "arm": labels.arm,
        "variant": labels.variant,
        "mode": labels.mode,
        "rho_target": labels.rho_target,
        "rho": labels.rho,
        "seed": spec.seed,
        "replicate": spec.replicate,
        "P_tot": counts.P_tot,
        "P_act": counts.P_act,
        "P_sparse": counts.P_sparse,
        "P_moe_sparse": counts.P_moe_sparse,
        "P_engram": counts.P_engram,
        "P_vocab": counts.P_vocab,
        "P_tot_per_P_act": counts.P_tot / counts.P_act,
        "flops_per_token": flops_per_token,
        "flops": flops_per_token * tokens,
        "train_tokens": tokens,
        "tokens_per_P_tot": tokens / counts.P_tot,
        "steps": trainer.step,
        "n_routed_experts": model.moe.n_routed_experts if model.moe else 0,
        "top_k": model.moe.top_k if model.moe else 0,
        "n_slots": model.memory.tables.n_rows if model.memory else 0,
        "engram_layers": " ".join(map(str, model.engram.layer_ids)) if model.engram else None,
        "n_layers": model.n_layers,
        "d_model": model.d_model,
        "n_streams": model.n_streams,
        "vocab_size": model.vocab_size,
        "lr": spec.train.optim.lr,
        "table_lr_mult": spec.train.optim.table_lr_mult,
        "corpus": trainer.shards.corpus,
        "data": spec.data,
        "epochs": trainer.order.epochs(tokens),
        "train_loss": line["loss"] if math.isfinite(line["loss"]) else None,
        "valid_loss": valid["loss"] if valid else None,
        "valid_bpb": valid["bpb"] if valid else None,
        "valid_tokens": valid["valid_tokens"] if valid else None,
    }


def _cost(run_dir: RunDir, trainer: Trainer) -> dict[str, Any]:
    seconds = attempt_seconds(run_dir.path)
    on_gpu = trainer.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else peak_of_process()
    facts = provenance()
    return {
        "seconds": seconds,
        "tokens_per_s": round(trainer.step * trainer.spec.train.batch_tokens / seconds, 1) if seconds else None,
        "peak_memory_gib": round(peak / 2**30, 3),
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "host_cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "processes": trainer.team.size,
        "micro_batch_tokens": trainer.micro_sequences * trainer.spec.train.seq_len,
        "attempts": run_dir.attempts(),
        "commit": facts["commit"],
        "dirty": facts["dirty"],
        "torch": torch.__version__,
        "python": facts["python"],
    }


def cpu_name() -> str:
    """The machine's processor."""
    try:
        with open(Path("/proc/cpuinfo"), encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
