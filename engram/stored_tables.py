"""Tables that stay where they are stored, in host memory say; a step sees only the rows that it reads.

    prefetch    the next step's row ids, each once      rows and moments  store -> device    while a step computes
    begin       rows that the step before has changed meanwhile are taken from it, on the device
    forward     the working set [U, P] is a leaf of the graph; gradients are as large as what was read
    step        Adam over the working set, on the device
    write back  rows and moments                        device -> store                      while the next computes

Every row is exact at every step: losses are those of tables on the device. One thread moves rows, in order, so that a
prefetch sees all write-backs but the last, which `begin` mends. Transfers go through pinned staging buffers; the tables
themselves are ordinary memory, which is bounded by the machine's and not by what may be pinned.

Stored in bf16, a row is rounded up or down at random, in proportion: rounded to the nearest, small steps would vanish.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from engram.memory import NgramTables
from engram.table_adam import adam_rows


@dataclass(frozen=True)
class WorkingSet:
    """The rows of one layer that one step reads, on the computing device, in fp32."""

    rows_U: Tensor
    """Row ids, rising, each once."""
    values_UP: Tensor
    first_UP: Tensor
    second_UP: Tensor
    """[U, P], or [U, 1] for the row-wise optimiser."""


class StoredTables(nn.Module):
    """`NgramTables` whose rows are stored elsewhere, or in another precision, than they are computed with.

    Args:
        tables: the whole tables. Their weights are not read: the store is made to be initialised or loaded.
        store: where rows and their moments lie.
        dtype: what they are stored in.
    """

    def __init__(self, tables: NgramTables, store: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.first_row = 0
        table_SP = torch.empty(tables.table_SP.shape, dtype=dtype, device=store)
        self.table_SP = nn.Parameter(table_SP, requires_grad=False)
        self.working: WorkingSet | None = None
        """Set for the length of a training step."""

    def forward(self, rows_BTG: Tensor) -> Tensor:
        """Return e_BTQ, the concatenated rows in fp32; Q = G * P = d_mem."""
        if self.working is None or not torch.is_grad_enabled():
            rows_U, place_BTG = rows_BTG.unique(return_inverse=True)
            values_UP = self.table_SP[rows_U.to(self.table_SP.device)].to(rows_BTG.device, torch.float32)
            return F.embedding(place_BTG, values_UP).flatten(-2)
        place_BTG = torch.searchsorted(self.working.rows_U, rows_BTG)
        # Sparse, though every row is read: the sum over equal rows is then the very one of `NgramTables`.
        return F.embedding(place_BTG, self.working.values_UP, sparse=True).flatten(-2)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StoredTables:
        return self  # model.to(device) leaves the store where it is


class StoredTableAdam(Optimizer):
    """Lazy or row-wise Adam over stored tables, and the thread that moves their rows.

    Its state has the names of `TableAdam`'s, so that a checkpoint of one is taken up by the other.

    Args:
        tables: one module a memory layer, in the order in which the hasher gives rows.
        device: where steps are computed.
        rowwise: one second moment a row.
    """

    def __init__(
        self,
        tables: Sequence[StoredTables],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        rowwise: bool,
        device: torch.device,
    ) -> None:
        super().__init__([t.table_SP for t in tables], {"lr": lr, "betas": betas, "eps": eps, "rowwise": rowwise})
        self.tables, self.device = tuple(tables), device
        self._mover = ThreadPoolExecutor(1, thread_name_prefix="rows")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._coming: Future[tuple[list[WorkingSet], Any]] | None = None
        self._writing: Future[Any] | None = None
        self._fetched_before = False
        self._before: list[WorkingSet | None] = [None] * len(tables)

    def prefetch(self, look_ups: Callable[[], Sequence[Tensor]]) -> None:
        """Begin to bring the rows of a step; `look_ups`, called in the moving thread, gives row ids a layer."""
        assert self._coming is None, "the rows that were fetched before were not used"
        if self._stream is not None and not self._fetched_before:
            # What initialised or loaded the store and its moments.
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        self._fetched_before = True
        self._coming = self._mover.submit(self._fetch, look_ups)

    @property
    def is_fetching(self) -> bool:
        """Whether the rows of a step were asked for and not yet taken."""
        return self._coming is not None

    def begin(self) -> None:
        """Make the fetched rows the working sets of this step."""
        assert self._coming is not None, "prefetch first"
        fetched, ready = self._coming.result()
        self._coming = None
        if ready is not None:
            torch.cuda.current_stream(self.device).wait_event(ready)
        for tables, fresh, old in zip(self.tables, fetched, self._before, strict=True):
            tables.working = _mended(fresh, old)
            tables.working.values_UP.requires_grad_()

    def gradients(self) -> list[Tensor]:
        """Gradients of the working sets [U, P], summed over equal rows; scaled in place, they stay scaled."""
        grads = []
        for tables in self.tables:
            assert tables.working is not None, "begin first"
            leaf = tables.working.values_UP
            assert leaf.grad is not None, "no backward since begin"
            leaf.grad = leaf.grad.coalesce()
            grads.append(leaf.grad.values())
        return grads

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None, "closures are not used"
        self.flush()  # a failed write-back is raised here, one step late at most
        group = self.param_groups[0]
        changed: list[WorkingSet] = []
        for layer, (tables, grad_UP) in enumerate(zip(self.tables, self.gradients(), strict=True)):
            working, state = tables.working, self._state_of(tables)
            assert working is not None
            values_UP = working.values_UP.detach()
            state["step"] += 1
            values_UP.add_(adam_rows(grad_UP, working.first_UP, working.second_UP, state["step"], group))
            if tables.table_SP.dtype == torch.bfloat16:
                generator = torch.Generator(self.device).manual_seed(state["step"] * len(self.tables) + layer)
                values_UP = round_at_random(values_UP, generator)
            first_UP, second_UP = (_as_stored(m, tables.table_SP) for m in (working.first_UP, working.second_UP))
            changed.append(WorkingSet(working.rows_U, values_UP, first_UP, second_UP))
            tables.working = None
        done = None
        if self._stream is not None:
            done = torch.cuda.Event()
            done.record(torch.cuda.current_stream(self.device))
        self._before = list(changed)
        self._writing = self._mover.submit(self._write_back, changed, done)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing to do: a working set's gradient goes with it."""

    def flush(self) -> None:
        """Wait until the store is up to date, before it is saved or read.

        A store on a GPU is so for what is put on the current stream from here on.

        Raises:
            RuntimeError: a write-back failed.
        """
        if self._writing is not None:
            written = self._writing.result()
            if written is not None:
                torch.cuda.current_stream(self.device).wait_event(written)
            self._writing = None

    def _state_of(self, tables: StoredTables) -> dict[str, Any]:
        table_SP = tables.table_SP
        state: dict[str, Any] = self.state[table_SP]
        if not state:
            state["step"] = 0
            state["first"] = torch.zeros_like(table_SP)
            state["second"] = torch.zeros_like(table_SP[:, :1] if self.param_groups[0]["rowwise"] else table_SP)
        return state

    @torch.no_grad()
    def _fetch(self, look_ups: Callable[[], Sequence[Tensor]]) -> tuple[list[WorkingSet], Any]:
        with self._on_own_stream():
            fetched = []
            for tables, rows in zip(self.tables, look_ups(), strict=True):
                rows_U = rows.unique()
                stored_U, state = rows_U.to(tables.table_SP.device), self._state_of(tables)
                parts = (self._brought(x, stored_U) for x in (tables.table_SP, state["first"], state["second"]))
                fetched.append(WorkingSet(rows_U, *parts))
            if self._stream is None:
                return fetched, None
            for working in fetched:  # made on this stream, used and freed on the step's
                for x in (working.rows_U, working.values_UP, working.first_UP, working.second_UP):
                    x.record_stream(torch.cuda.default_stream(self.device))
            return fetched, self._stream.record_event()

    def _brought(self, stored: Tensor, stored_U: Tensor) -> Tensor:
        rows = stored.index_select(0, stored_U)
        if rows.device != self.device and self._stream is not None:
            rows = rows.pin_memory()
        return rows.to(self.device, non_blocking=True).float()

    @torch.no_grad()
    def _write_back(self, changed: Sequence[WorkingSet], done: Any) -> Any:
        with self._on_own_stream():
            if self._stream is not None:
                self._stream.wait_event(done)
            for tables, working in zip(self.tables, changed, strict=True):
                state, store = self._state_of(tables), tables.table_SP.device
                stored_U = working.rows_U.to(store)
                for stored, values in (
                    (tables.table_SP, working.values_UP),
                    (state["first"], working.first_UP),
                    (state["second"], working.second_UP),
                ):
                    stored.index_copy_(0, stored_U, self._sent(values.to(stored.dtype), store))
            return None if self._stream is None else self._stream.record_event()

    def _sent(self, values: Tensor, store: torch.device) -> Tensor:
        if self._stream is None or store == self.device:
            return values.to(store)
        staged = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
        self._stream.synchronize()
        return staged

    @contextmanager
    def _on_own_stream(self) -> Iterator[None]:
        if self._stream is None:
            yield
        else:
            with torch.cuda.stream(self._stream):
                yield


def _mended(fresh: WorkingSet, old: WorkingSet | None) -> WorkingSet:
    """Take the rows that `old` has changed from it: they were fetched before they were written back."""
    if old is None:
        return fresh
    at_U = torch.searchsorted(old.rows_U, fresh.rows_U).clamp_(max=len(old.rows_U) - 1)
    same_U1 = (old.rows_U[at_U] == fresh.rows_U)[:, None]
    pairs = zip(
        (old.values_UP, old.first_UP, old.second_UP), (fresh.values_UP, fresh.first_UP, fresh.second_UP), strict=True
    )
    return WorkingSet(fresh.rows_U, *(torch.where(same_U1, theirs[at_U], ours) for theirs, ours in pairs))


def _as_stored(moments: Tensor, table_SP: Tensor) -> Tensor:
    """Round to the nearest: a moment moves by a tenth of its distance, which bf16 can tell."""
    return moments.to(table_SP.dtype).float()


def round_at_random(x: Tensor, generator: torch.Generator) -> Tensor:
    """Round fp32 to values that bf16 holds, up or down in proportion, so that the mean is kept."""
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    return ((x.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32)


def store_tables(model: nn.Module, store: torch.device, dtype: torch.dtype) -> None:
    """Replace every table of a model by a stored one."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NgramTables):
                setattr(module, name, StoredTables(child, store, dtype))
