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
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, Shard

from engram.hashing import HashSpec
from engram.optim import Optimizers
from engram.sharding import ShardedTables
from engram.transformer import Transformer
from experiments.parallel import Team
from experiments.settings import UserError

State = dict[str, Any]

_ANY = (Exception, CheckpointException)  # the last is no Exception, and wraps one of each process
_DAMAGE = (EOFError, UnpicklingError, FileNotFoundError, KeyError, ValueError, TypeError, AssertionError)
"""What reading a damaged file raises. torch also raises RuntimeError, whose text then names the archive."""


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
    target = _state_of(folder, facts["step"])
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
    except _ANY as error:
        shutil.rmtree(draft, ignore_errors=True)
        cause = _cause(error)
        # torch reports a failed write as RuntimeError; others are no matter of the disk.
        remedy = "free space and " if isinstance(cause, OSError) or "riter" in str(cause) else ""
        raise OSError(f"could not write {target}: {_reason(cause)}; {remedy}launch again") from error


def read_facts(folder: Path) -> State | None:
    """The facts of the newest whole state, or None if there is no state.

    Raises:
        UserError: the state is damaged.
        OSError: it could not be read, though nothing says that it is damaged.
    """
    source = newest(folder)
    if source is None:
        return None
    state: State = {"facts": b""}
    try:
        with _quietly():
            load(state, checkpoint_id=source, no_dist=True)
        return _from_bytes(state["facts"])
    except _ANY as error:
        raise _unreadable(source, error) from error


def load_tensors(folder: Path, step: int, team: Team, model: nn.Module, optimizers: Optimizers) -> None:
    """Take up the state of a step, which `read_facts` has told; every process of the run calls this.

    Raises:
        UserError: the state is damaged, or of another model.
        OSError: it could not be read, though nothing says that it is damaged.
    """
    source = _state_of(folder, step)
    tensors = _Tensors(team, model, optimizers)
    try:
        with _quietly():
            reader = FileSystemReader(source)
            state = tensors.expected(reader.read_metadata().state_dict_metadata)
            load(state, storage_reader=reader, no_dist=team.size == 1)
    except _ANY as error:
        raise _unreadable(source, error) from error
    tensors.take(state)


def load_weights(folder: Path, model: nn.Module) -> State:
    """Fill a whole model from the newest state, whatever number of processes wrote it; return the state's facts.

    Raises:
        UserError: there is no state, or it is damaged or of another model.
        OSError: it could not be read, though nothing says that it is damaged.
    """
    facts = read_facts(folder)
    if facts is None:
        raise UserError(f"no checkpoint in {folder}: its weights were deleted; delete the run and launch it again")
    source = _state_of(folder, facts["step"])
    try:
        with _quietly():
            load({f"model.{name}": x for name, x in model.state_dict().items()}, checkpoint_id=source, no_dist=True)
    except _ANY as error:
        raise _unreadable(source, error) from error
    return facts


def check_hash(folder: Path, facts: State, model: Transformer) -> None:
    """Refuse tables that were trained with another hash.

    Raises:
        UserError: names the part that differs.
    """
    if model.hash_spec is not None:
        try:
            model.hash_spec.check_same(HashSpec.from_state(facts["hash_spec"]))
        except ValueError as error:
            raise UserError(f"{folder}: {error}") from error


def newest(folder: Path) -> Path | None:
    """Directory of the newest whole state."""
    return max((path for path in folder.glob("step-*") if path.suffix != ".part"), default=None)


def _state_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:010d}"


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


def _unreadable(source: Path, error: BaseException) -> Exception:
    """What to raise where a state could not be read: the user's matter only if the files are at fault."""
    cause = _cause(error)
    if isinstance(cause, _DAMAGE) or any(word in str(cause) for word in ("PytorchStreamReader", "archive")):
        return UserError(f"{source} is damaged ({_reason(cause)}): delete it to train this run from its start")
    return OSError(f"could not read {source}: {_reason(cause)}; launch again")


def _cause(error: BaseException) -> BaseException:
    """The first process's exception; torch wraps one of each."""
    if isinstance(error, CheckpointException) and error.failures:
        return next(iter(error.failures.values()))[0]
    return error


def _reason(error: BaseException) -> str:
    """Kind and text in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200].rstrip(": ")


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
