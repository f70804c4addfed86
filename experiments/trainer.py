"""One run's state and its steps: model, optimisers, step number. `experiments.train` drives it.

A step is a pure function of (state, step number): the batch comes from the step number, random rows too, and nothing
draws from a global generator. A run that was killed and resumed therefore takes the same steps: bit for bit on CPUs; on
GPUs up to the order in which some kernels add.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engram.hashing import compress_vocabulary
from engram.initialise import init_weights
from engram.optim import build_optimizers, needs_sparse_grad, update_router_biases
from engram.schedule import lr_factor
from engram.stored_tables import store_tables
from engram.transformer import Transformer
from experiments.checkpoint import check_hash, load_tensors, read_facts, save_checkpoint
from experiments.evaluate import validate
from experiments.parallel import Team
from experiments.settings import RunSpec, Runtime, UserError
from experiments.shards import Shards, TrainOrder, check_vocab, valid_batches

VALID_SEQUENCES = 32  # scored at once: nothing is kept for a backward pass


class Trainer:
    """A model on its way through a run.

    Args:
        spec: the run.
        shards: the tokens that the spec names.
        runtime: device, threads and the like. It changes the order of sums, nothing else; once rounding has made a
            token at a tie choose another expert, that can move a loss as much as another seed does.
        team: the processes that train the run together; None is this one alone.

    Raises:
        UserError: shards, tokenizer or settings do not fit the spec.
    """

    def __init__(self, spec: RunSpec, shards: Shards, runtime: Runtime, team: Team | None = None) -> None:
        check_vocab(shards, spec.model.vocab_size)
        if shards.hash != spec.data:
            raise UserError(
                f"run {spec.run_id} was planned for shards {spec.data[:12]}, but {shards.path} holds "
                f"{shards.hash[:12]}: launch again to make a run for these shards"
            )
        self.spec, self.shards = spec, shards
        torch.set_num_threads(runtime.threads)
        self.team = team or Team(runtime)
        self.device = self.team.device
        self.n_sequences = spec.train.batch_tokens // spec.train.seq_len
        self.micro_sequences = runtime.micro_sequences(spec.train, self.team.size)

        compressed_V = None
        if spec.model.memory is not None:
            compressed_V = compress_vocabulary(shards.tokenizer, spec.model.vocab_size)
        self.model = Transformer(spec.model, compressed_V)
        self.model.set_sparse_tables(needs_sparse_grad(spec.train.optim))
        self._store_tables(runtime)
        self.team.split(self.model)  # first: the whole model need not fit a device
        self.model.to(self.device)
        init_weights(self.model, spec.seed)
        self.optimizers = build_optimizers(
            self.model,
            spec.train.optim,
            self.team.sum,
            tables_are_split=self.team.size > 1,
            muon_dtype=torch.bfloat16 if spec.train.precision == "bf16" else torch.float32,
        )
        self.forward = self.team.wrap(self.model)
        self.order = TrainOrder(shards, spec.train.seq_len, spec.seed)
        self.step = 0
        self.metrics_bytes = 0
        """Length of the metrics written up to this step."""

    def _store_tables(self, runtime: Runtime) -> None:
        optim = self.spec.train.optim
        runtime.check_tables(optim, self.team.size)
        dtype = torch.bfloat16 if optim.table_dtype == "bf16" else torch.float32
        if runtime.table_device == "same" and dtype == torch.float32:
            return
        store = torch.device("cpu") if runtime.table_device == "cpu" else self.device
        store_tables(self.model, store, dtype)

    def save(self, folder: Path) -> None:
        """Write all that a run goes on from.

        Raises:
            OSError: the disk is full or not writable; the former checkpoint is untouched.
        """
        if self.optimizers.stored:
            self.optimizers.stored.flush()
        hash_spec = self.model.hash_spec
        facts = {
            "run_id": self.spec.run_id,
            "step": self.step,
            "metrics_bytes": self.metrics_bytes,
            "hash_spec": hash_spec.state() if hash_spec else None,
        }
        save_checkpoint(folder, self.team, self.model, self.optimizers, facts)

    def resume(self, folder: Path) -> bool:
        """Take up the checkpoint, if there is one.

        Raises:
            UserError: the checkpoint is damaged, another run's, or hashed otherwise.
        """
        # The first process's answer: file systems may show others an older state.
        facts = self.team.share(read_facts(folder) if self.team.is_first else None)
        if facts is None:
            return False
        if facts["run_id"] != self.spec.run_id:
            raise UserError(f"{folder} belongs to run {facts['run_id']}: delete it to train from the start")
        check_hash(folder, facts, self.model)
        load_tensors(folder, facts["step"], self.team, self.model, self.optimizers)
        self.step, self.metrics_bytes = facts["step"], facts["metrics_bytes"]
        return True

    def train_step(self) -> dict[str, Any]:
        """Take one optimiser step; return its line of metrics."""
        train = self.spec.train
        batch, draws = self._batch(self.step)
        self._begin_rows()
        own = self.team.part(self.n_sequences)
        micro_batches = list(
            zip(batch[own].split(self.micro_sequences), draws[own].split(self.micro_sequences), strict=True)
        )
        loss_sum = torch.zeros((), device=self.device)
        for i, (micro, micro_draws) in enumerate(micro_batches, start=1):
            ids = micro.to(self.device, non_blocking=True)
            with self.team.accumulating(self.forward, last=i == len(micro_batches)):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=train.precision == "bf16"):
                    loss = self.forward(ids[:, :-1], ids[:, 1:], micro_draws.to(self.device))
                # The weight makes micro-batches of all processes add up to the mean over the whole batch.
                loss = loss * (len(micro) / self.n_sequences)
                loss.backward()
            loss_sum += loss.detach()
        self.team.sum(loss_sum)
        grad_norm = self.optimizers.clip(train.optim.grad_clip)
        factor = lr_factor(self.step, train.steps, train.optim)
        self.optimizers.step(factor)
        self.optimizers.zero_grad()
        update_router_biases(self.model, train.optim.router_bias_gamma, self.team.sum)
        self.step += 1
        return {
            "step": self.step,
            "tokens": self.step * train.batch_tokens,
            "split": "train",
            "loss": float(loss_sum),
            "grad_norm": grad_norm,
            "lr": train.optim.lr * factor,
        }

    def _batch(self, step: int) -> tuple[Tensor, Tensor]:
        """A step's tokens [B, T + 1] and the numbers of its sequences, which do not depend on how a batch is split."""
        batch = torch.from_numpy(self.order.batch(step, self.n_sequences))
        return batch, torch.arange(step * self.n_sequences, (step + 1) * self.n_sequences)

    def _begin_rows(self) -> None:
        """Bring the rows of this step, if they are not here yet, and ask for those of the next."""
        if (stored := self.optimizers.stored) is None:
            return
        if not stored.is_fetching:
            stored.prefetch(partial(self._look_ups, *self._batch(self.step)))
        stored.begin()
        if self.step + 1 < self.spec.train.steps:
            stored.prefetch(partial(self._look_ups, *self._batch(self.step + 1)))

    def _look_ups(self, batch: Tensor, draws: Tensor) -> list[Tensor]:
        return self.model.look_ups(batch[:, :-1].to(self.device), draws.to(self.device))[0]

    def valid_step(self) -> dict[str, Any]:
        """Score the validation tokens; return a line of metrics."""
        train = self.spec.train
        if self.optimizers.stored:
            self.optimizers.stored.flush()
        at_once = min(self.micro_sequences, VALID_SEQUENCES) * self.team.size
        batches = valid_batches(self.shards, train.eval_tokens, train.seq_len, at_once)
        score = validate(self.model, batches, self.shards.token_bytes, train.precision, self.team)
        return {
            "step": self.step,
            "tokens": self.step * train.batch_tokens,
            "split": "valid",
            "loss": score.nats_per_token,
            "bpb": score.bits_per_byte,
            "valid_tokens": score.tokens,
        }
