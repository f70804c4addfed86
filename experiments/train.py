"""The only training loop: every arm of every study goes through it.

A step is a pure function of (state, step number): the batch comes from the step number, random rows too, and nothing
draws from a global generator. A run that was killed and resumed therefore writes the same metrics to the byte.
"""

from __future__ import annotations

import json
import math
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Literal

import torch

from engram.counting import count_params, train_flops_per_token
from engram.hashing import HashSpec, compress_vocabulary
from engram.initialise import init_weights
from engram.optim import build_optimizers, needs_sparse_grad, update_router_biases
from engram.schedule import lr_factor
from engram.transformer import Transformer
from experiments.checkpoint import load_checkpoint, save_checkpoint
from experiments.evaluate import validate
from experiments.rundir import RunDir, provenance
from experiments.settings import Run, Runtime, UserError
from experiments.shards import Shards, TrainOrder, check_vocab, valid_batches

Outcome = Literal["final", "diverged", "interrupted"]

DIVERGED_FACTOR = 3.0  # a loss this many times ln(V), that of a uniform guess, does not come back


class Trainer:
    """State of one run: model, optimisers, step, logs. `train` drives it."""

    def __init__(self, run: Run, run_dir: RunDir, shards: Shards, runtime: Runtime) -> None:
        spec = run.spec
        check_vocab(shards, spec.model.vocab_size)
        if shards.hash != spec.data:
            raise UserError(
                f"run {spec.run_id} was planned for shards {spec.data[:12]}, but {shards.path} holds {shards.hash[:12]}: "
                "launch again to make a run for these shards"
            )
        self.run, self.spec, self.run_dir, self.shards = run, spec, run_dir, shards
        torch.set_num_threads(runtime.threads)
        self.device = choose_device(runtime.device)
        self.micro_sequences = _micro_sequences(spec.train.batch_tokens, spec.train.seq_len, runtime.micro_batch_tokens)

        compressed_V = None
        if spec.model.memory is not None:
            compressed_V = compress_vocabulary(shards.tokenizer, spec.model.vocab_size)
        self.model = Transformer(spec.model, compressed_V).to(self.device)
        init_weights(self.model, spec.seed)
        self.model.set_sparse_tables(needs_sparse_grad(spec.train.optim))
        self.optimizers = build_optimizers(self.model, spec.train.optim)
        self.order = TrainOrder(shards, spec.train.seq_len, spec.seed)
        self.step = 0
        self.metrics_bytes = 0

    @property
    def checkpoint_path(self) -> Path:
        return self.run_dir.path / "checkpoint.pt"

    def save(self) -> None:
        hash_spec = self.model.hash_spec
        save_checkpoint(
            self.checkpoint_path,
            {
                "run_id": self.spec.run_id,
                "step": self.step,
                "metrics_bytes": self.metrics_bytes,
                "model": self.model.state_dict(),
                "optimizers": self.optimizers.state_dict(),
                "hash_spec": hash_spec.state() if hash_spec else None,
            },
        )

    def resume(self) -> bool:
        """Take up the checkpoint, if there is one.

        Raises:
            UserError: the checkpoint is damaged, another run's, or hashed otherwise.
        """
        state = load_checkpoint(self.checkpoint_path)
        if state is None:
            return False
        if state["run_id"] != self.spec.run_id:
            raise UserError(
                f"{self.checkpoint_path} belongs to run {state['run_id']}: delete it to train from the start"
            )
        if self.model.hash_spec is not None:
            try:
                self.model.hash_spec.check_same(HashSpec.from_state(state["hash_spec"]))
            except ValueError as error:
                raise UserError(f"{self.checkpoint_path}: {error}") from error
        self.model.load_state_dict(state["model"])
        self.optimizers.load_state_dict(state["optimizers"])
        self.step, self.metrics_bytes = state["step"], state["metrics_bytes"]
        return True

    def train_step(self) -> dict[str, Any]:
        """Take one optimiser step; return its line of metrics."""
        train = self.spec.train
        batch = torch.from_numpy(self.order.batch(self.step, train.batch_tokens // train.seq_len))
        micro_batches = batch.split(self.micro_sequences)
        loss_sum = torch.zeros((), device=self.device)
        for i, micro in enumerate(micro_batches):
            ids = micro.to(self.device, non_blocking=True)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=train.precision == "bf16"):
                loss = self.model(ids[:, :-1], ids[:, 1:], draw=self.step * len(micro_batches) + i)
            # The weight makes unequal micro-batches add up to the mean over the whole batch.
            loss = loss * (len(micro) / len(batch))
            loss.backward()
            loss_sum += loss.detach()
        grad_norm = self.optimizers.clip(train.optim.grad_clip)
        factor = lr_factor(self.step, train.steps, train.optim)
        self.optimizers.step(factor)
        self.optimizers.zero_grad()
        update_router_biases(self.model, train.optim.router_bias_gamma)
        self.step += 1
        return {
            "step": self.step,
            "tokens": self.step * train.batch_tokens,
            "split": "train",
            "loss": float(loss_sum),
            "grad_norm": grad_norm,
            "lr": train.optim.lr * factor,
        }

    def valid_step(self) -> dict[str, Any]:
        """Score the validation tokens; return a line of metrics."""
        train = self.spec.train
        per_batch = max(1, min(self.micro_sequences, 32))
        batches = valid_batches(self.shards, train.eval_tokens, train.seq_len, per_batch)
        score = validate(self.model, batches, self.shards.token_bytes, train.precision)
        return {
            "step": self.step,
            "tokens": self.step * train.batch_tokens,
            "split": "valid",
            "loss": score.nats_per_token,
            "bpb": score.bits_per_byte,
            "valid_tokens": score.tokens,
        }

    def result(self, train_line: dict[str, Any], valid_line: dict[str, Any] | None) -> dict[str, Any]:
        """What the run found: only what an equal run would find again."""
        spec, labels, counts = self.spec, self.run.labels, count_params(self.spec.model)
        model, tokens = spec.model, self.step * spec.train.batch_tokens
        flops_per_token = train_flops_per_token(model, spec.train.seq_len)
        return {
            "run_id": spec.run_id,
            "schema": spec.schema,
            "budget": labels.budget,
            "arm": labels.arm,
            "mode": labels.mode,
            "rho_target": labels.rho_target,
            "rho": labels.rho,
            "seed": spec.seed,
            "P_tot": counts.P_tot,
            "P_act": counts.P_act,
            "P_sparse": counts.P_sparse,
            "P_moe_sparse": counts.P_moe_sparse,
            "P_engram": counts.P_engram,
            "P_vocab": counts.P_vocab,
            "flops_per_token": flops_per_token,
            "flops": flops_per_token * tokens,
            "train_tokens": tokens,
            "steps": self.step,
            "n_routed_experts": model.moe.n_routed_experts if model.moe else 0,
            "top_k": model.moe.top_k if model.moe else 0,
            "n_slots": model.memory.tables.n_rows if model.memory else 0,
            "n_layers": model.n_layers,
            "d_model": model.d_model,
            "n_streams": model.n_streams,
            "vocab_size": model.vocab_size,
            "corpus": self.shards.corpus,
            "data": spec.data,
            "epochs": self.order.epochs(tokens),
            "train_loss": _finite_or_none(train_line["loss"]),
            "valid_loss": valid_line["loss"] if valid_line else None,
            "valid_bpb": valid_line["bpb"] if valid_line else None,
            "valid_tokens": valid_line["valid_tokens"] if valid_line else None,
        }


def train(run_dir: RunDir, shards: Shards, runtime: Runtime, stop_asked: Callable[[], bool]) -> Outcome:
    """Train a run to its end, from wherever it stands. The caller holds the run's lock.

    Args:
        run_dir: directory with a config.yaml.
        shards: the tokens the spec names.
        runtime: device, threads and the like; the result does not depend on it beyond rounding.
        stop_asked: polled after each step; True saves a checkpoint and returns "interrupted".

    Raises:
        UserError: shards, tokenizer or checkpoint do not fit the spec.
        OSError: a file could not be written; earlier files are whole.
    """
    if (final := run_dir.final()) is not None:
        return "diverged" if final["status"] == "diverged" else "final"
    run = run_dir.load()
    run_dir.note_attempt("start", **provenance(), threads=runtime.threads)
    trainer = Trainer(run, run_dir, shards, runtime)
    resumed = trainer.resume()
    steps, eval_every = run.spec.train.steps, run.spec.train.eval_every
    print(
        f"{run.spec.run_id}: {'resumes at' if resumed else 'starts at'} step {trainer.step} of {steps} on {trainer.device}"
    )

    began = last_saved = time.monotonic()
    first_step, line, valid_line = trainer.step, {"loss": math.nan}, None
    with _open_cut(run_dir.path / "metrics.jsonl", trainer.metrics_bytes) as metrics, _Timing(run_dir.path) as timing:
        while trainer.step < steps:
            line = trainer.train_step()
            if _diverged(line, run.spec.model.vocab_size):
                print(
                    f"{run.spec.run_id}: diverged at step {trainer.step}: loss {line['loss']}, gradient {line['grad_norm']}"
                )
                return _finish(trainer, "diverged", line, None, began)
            trainer.metrics_bytes += _write_line(metrics, line)
            if trainer.step == steps or (eval_every and trainer.step % eval_every == 0):
                valid_line = trainer.valid_step()
                trainer.metrics_bytes += _write_line(metrics, valid_line)
            timing.note(trainer.step, run.spec.train.batch_tokens)
            stopping = stop_asked() and trainer.step < steps
            if stopping or trainer.step == steps or time.monotonic() - last_saved >= runtime.checkpoint_every_s:
                os.fsync(metrics.fileno())
                trainer.save()
                last_saved = time.monotonic()
            if stopping:
                run_dir.note_attempt("interrupted", step=trainer.step, seconds=round(time.monotonic() - began, 3))
                return "interrupted"
    if valid_line is None:  # killed between the last checkpoint and final.json
        assert first_step == steps
        line, valid_line = _last_lines(run_dir.path / "metrics.jsonl")
    return _finish(trainer, "final", line, valid_line, began)


def choose_device(wanted: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device asked for.

    Raises:
        UserError: "cuda" without a usable GPU.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "runtime.device=cuda, but torch sees no GPU: use runtime.device=cpu or install a CUDA build of torch"
        )
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def _finish(
    trainer: Trainer,
    status: Literal["final", "diverged"],
    line: dict[str, Any],
    valid: dict[str, Any] | None,
    began: float,
) -> Outcome:
    seconds = _earlier_seconds(trainer.run_dir) + time.monotonic() - began
    on_gpu = trainer.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    facts = provenance()
    cost = {
        "seconds": round(seconds, 3),
        "tokens_per_s": round(trainer.step * trainer.spec.train.batch_tokens / seconds, 1),
        "peak_memory_gib": round(peak / 2**30, 3),
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "threads": torch.get_num_threads(),
        "attempts": trainer.run_dir.attempts(),
        "commit": facts["commit"],
        "dirty": facts["dirty"],
        "torch": torch.__version__,
        "python": facts["python"],
    }
    trainer.run_dir.write_final({"status": status, "result": trainer.result(line, valid), "cost": cost})
    return status


def _micro_sequences(batch_tokens: int, seq_len: int, micro_batch_tokens: int) -> int:
    if micro_batch_tokens % seq_len != 0:
        raise UserError(f"runtime.micro_batch_tokens={micro_batch_tokens} must be a multiple of seq_len={seq_len}")
    return (micro_batch_tokens or batch_tokens) // seq_len


def _diverged(line: dict[str, Any], vocab_size: int) -> bool:
    finite = math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"])
    return not finite or line["loss"] > DIVERGED_FACTOR * math.log(vocab_size)


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _open_cut(path: Path, n_bytes: int) -> IO[bytes]:
    """Open metrics for appending after the checkpoint's last line: later lines belong to steps that will run again."""
    file = open(path, "ab")
    file.truncate(n_bytes)
    return file


def _write_line(file: IO[bytes], line: dict[str, Any]) -> int:
    text = (json.dumps(line) + "\n").encode()
    file.write(text)
    file.flush()
    return len(text)


def _last_lines(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The last training and the last validation line."""
    lines = [json.loads(text) for text in path.read_text().splitlines()[-2:]]
    return lines[0], lines[1]


def _earlier_seconds(run_dir: RunDir) -> float:
    """Seconds of earlier attempts, up to their last step."""
    seconds, last = 0.0, 0.0
    for text in (run_dir.path / "timing.jsonl").read_text().splitlines():
        now = json.loads(text)["seconds"]
        seconds += last if now < last else 0.0
        last = now
    return seconds


class _Timing:
    """timing.jsonl: seconds since this attempt began and the rate since the line before."""

    def __init__(self, run_path: Path) -> None:
        path = run_path / "timing.jsonl"
        whole = path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0
        self.file = _open_cut(path, whole)  # a kill may have torn the last line
        self.began = self.last = time.monotonic()

    def __enter__(self) -> _Timing:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def note(self, step: int, tokens: int) -> None:
        now = time.monotonic()
        rate = round(tokens / (now - self.last), 1)
        _write_line(self.file, {"step": step, "seconds": round(now - self.began, 3), "tokens_per_s": rate})
        self.last = now
