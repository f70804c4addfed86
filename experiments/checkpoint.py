"""Training state on disk, replaced atomically: a kill at any moment leaves the old state or the new one, whole.

    checkpoint/step-0000000120/     written by torch.distributed.checkpoint, every process its own part

A state is written beside the old one and renamed when it is whole; then the old one goes. Tensors are named by what
they are in the whole model, so that a state written by four processes can be read by one, or by two.
"""

from __future__ import annotations

import io
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, Shard

from engram.optim import Optimizers
from engram.sharding import ShardedTables
from experiments.parallel import Team
from experiments.settings import UserError

State = dict[str, Any]

_DAMAGE = (Exception, CheckpointException)  # torch raises many kinds for a damaged file; the last is no Exception


def save_checkpoint(folder: Path, team: Team, model: nn.Module, optimizers: Optimizers, facts: State) -> None:
    """Write a state; every process of the run calls this.

    Args:
        folder: holds one state between calls.
        team: the processes.
        model: parameters and buffers.
        optimizers: what they remember of each parameter.
        facts: plain values and tensors, equal in all processes; "step" among them.

    Raises:
        OSError: the disk is full or not writable; the former state is untouched.
    """
    target = folder / f"step-{facts['step']:010d}"
    draft = target.with_suffix(".part")
    tensors = _Tensors(team, model, optimizers)
    try:
        if team.is_first:
            shutil.rmtree(draft, ignore_errors=True)  # of an attempt that was killed
            folder.mkdir(parents=True, exist_ok=True)
        team.share(None)  # nobody writes before that
        with _quietly():
            save(tensors.now() | {"facts": _to_bytes(facts)}, checkpoint_id=draft, no_dist=team.size == 1)
        if team.is_first:
            shutil.rmtree(target, ignore_errors=True)
            draft.replace(target)
            _sync(folder)
            for other in folder.glob("step-*"):
                if other != target:
                    shutil.rmtree(other)
    except (OSError, RuntimeError, CheckpointException) as error:  # torch reports a failed write as RuntimeError
        shutil.rmtree(draft, ignore_errors=True)
        raise OSError(f"could not write {target}: {_reason(error)}; free space and launch again") from error


def read_facts(folder: Path) -> State | None:
    """The facts of the newest whole state, or None if there is no state.

    Raises:
        UserError: the state is damaged.
    """
    source = newest(folder)
    if source is None:
        return None
    state: State = {"facts": b""}
    try:
        with _quietly():
            load(state, checkpoint_id=source, no_dist=True)
        return _from_bytes(state["facts"])
    except _DAMAGE as error:
        raise _damaged(source, error) from error


def load_tensors(folder: Path, team: Team, model: nn.Module, optimizers: Optimizers) -> None:
    """Take up the newest whole state; every process of the run calls this.

    Raises:
        UserError: the state is damaged, or of another model.
    """
    source = newest(folder)
    assert source is not None, "read_facts says whether there is a state"
    tensors = _Tensors(team, model, optimizers)
    try:
        with _quietly():
            reader = FileSystemReader(source)
            state = tensors.expected(reader.read_metadata().state_dict_metadata)
            load(state, storage_reader=reader, no_dist=team.size == 1)
    except _DAMAGE as error:
        raise _damaged(source, error) from error
    tensors.take(state)


def newest(folder: Path) -> Path | None:
    """Directory of the newest whole state."""
    return max((path for path in folder.glob("step-*") if path.suffix != ".part"), default=None)


class _Tensors:
    """A run's tensors by name: `model.NAME`, and `optimizer.NAME|WHAT` for what an optimiser remembers of NAME.

    Where processes hold parts of a tensor, it is a DTensor, which says where its part belongs.
    """

    def __init__(self, team: Team, model: nn.Module, optimizers: Optimizers) -> None:
        self.mesh, self.model, self.optimizers = team.mesh, model, optimizers
        self.parameters = dict(model.named_parameters())
        self.rows = {
            f"{name}.table_SP": module.n_rows
            for name, module in model.named_modules()
            if isinstance(module, ShardedTables)
        }

    def now(self) -> State:
        state: State = {f"model.{name}": self._placed(name, x) for name, x in self.model.state_dict().items()}
        for name, parameter in self.parameters.items():
            for what, value in self.optimizers.state_of(parameter).items():
                state[f"optimizer.{name}|{what}"] = self._placed(name, value)
        return state

    def expected(self, stored: dict[str, Any]) -> State:
        """The same with empty room for what a stored state says that optimisers remember."""
        state = {key: value for key, value in self.now().items() if key.startswith("model.")}
        for key, about in stored.items():
            if not key.startswith("optimizer."):
                continue
            name = key.removeprefix("optimizer.").partition("|")[0]
            state[key] = 0
            if isinstance(about, TensorStorageMetadata):
                state[key] = self._placed(name, self._room(self.parameters[name], name, about))
        return state

    def take(self, state: State) -> None:
        """Give the optimisers what was loaded; the model's tensors were filled in place."""
        for key, value in state.items():
            if key.startswith("optimizer."):
                name, _, what = key.removeprefix("optimizer.").partition("|")
                own = value.to_local() if name in self.rows and isinstance(value, DTensor) else value
                self.optimizers.restore(self.parameters[name], what, own)

    def _room(self, parameter: Tensor, name: str, about: TensorStorageMetadata) -> Tensor:
        dtype = about.properties.dtype
        if about.size == parameter.shape:
            return torch.zeros_like(parameter, dtype=dtype)
        if name in self.rows and about.size[:1] == (self.rows[name],):
            return torch.zeros(len(parameter), *about.size[1:], dtype=dtype, device=parameter.device)
        return torch.zeros(about.size, dtype=dtype, device=parameter.device)

    def _placed(self, name: str, value: Any) -> Any:
        """Say of a sharded table's part, or of what belongs to it row by row, where in the whole it lies."""
        if self.mesh is None or name not in self.rows or not isinstance(value, Tensor) or value.ndim == 0:
            return value
        shape = torch.Size((self.rows[name], *value.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(value, self.mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def _to_bytes(facts: State) -> bytes:
    buffer = io.BytesIO()
    torch.save(facts, buffer)
    return buffer.getvalue()


def _from_bytes(raw: bytes) -> State:
    return dict(torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True))


def _damaged(source: Path, error: BaseException) -> UserError:
    return UserError(
        f"{source} is damaged ({type(error).__name__}: {_reason(error)}): delete it to train this run from its start"
    )


def _reason(error: BaseException) -> str:
    """The cause in one line; torch wraps it in one traceback a process."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return " ".join(str(error).split())[:200]


def _sync(folder: Path) -> None:
    """Bring a rename to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _quietly() -> Iterator[None]:
    """torch warns that it saves in a single process, which is what was asked."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
