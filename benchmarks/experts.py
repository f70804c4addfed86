"""The layer of routed experts, forward and backward, against transformers' implementations and a sorted loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.rounds import Contender, Part, in_bf16, takes_bf16
from engram.config import MoEConfig
from engram.moe import RoutedExperts


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of the work: tokens, d_model, width of an expert, experts, experts a token."""

    N: int
    D: int
    F: int
    E: int
    K: int

    def __str__(self) -> str:
        return f"T {self.N}, d {self.D}, f {self.F}, E {self.E}, k {self.K}"


CPU = Shape(N=4096, D=256, F=128, E=106, K=6)
GPU = Shape(N=32768, D=1024, F=512, E=64, K=6)
TRANSFORMERS = ("grouped_mm", "eager", "batched_mm")
SONIC = ("sonicmoe", "scattermoe", "torch")
NOTE_BF16 = "every round has the same routing; where it differs, bf16 products of a new size cost a compilation"
NOTE_CUDA = "sonic-moe routes for itself, within its time, so its outputs are not compared"


def experts_part(device: torch.device, shape: Shape | None = None, *, bf16: bool | None = None) -> Part:
    """Our experts against each way that transformers has for `OlmoeExperts`. In bf16 on GPUs."""
    shape = shape or (CPU if device.type == "cpu" else GPU)
    bf16 = takes_bf16(device, bf16)
    dtype = torch.bfloat16 if bf16 else torch.float32
    work = _Work(shape, device, dtype)
    # batched_mm copies the weights of every routed token: 3 * N * K * D * F values.
    peers = [way for way in TRANSFORMERS if way != "batched_mm" or 3 * shape.N * shape.K * shape.D * shape.F < 2**30]
    contenders: dict[str, Callable[[], Contender]] = {"engram": lambda: work.contender(work.ours())}
    for way in peers:
        contenders[f"transformers {way}"] = lambda way=way: work.contender(work.olmoe(way))  # type: ignore[misc]
    contenders["sorted loop"] = lambda: work.contender(work.loop())
    if device.type == "cuda":
        for way in SONIC:
            contenders[f"sonic-moe {way}"] = lambda way=way: work.sonic(way)  # type: ignore[misc]
    return Part(
        name=in_bf16("experts", bf16),
        what=f"expert layer, forward + backward{', bf16' if bf16 else ''}: {shape}",
        target=1.5 if device.type == "cpu" else 1.0,
        at_least=True,
        contenders=contenders,
        tolerance=2e-2 if bf16 else 1e-4,
        note=NOTE_CUDA if device.type == "cuda" else NOTE_BF16 if bf16 else "",
    )


Layer = tuple[Callable[[Tensor, Tensor, Tensor], Tensor], Sequence[Tensor], Callable[[], Iterable[Tensor | None]]]
"""What to call with x, weights and ids; its parameters; and their gradients as (gate, up, down)."""


@dataclass
class _Work:
    shape: Shape
    device: torch.device
    dtype: torch.dtype

    def draw(self, *shape: int, seed: int) -> Tensor:
        values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return values.to(self.device, self.dtype)

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        s = self.shape
        gate, up = (self.draw(s.E, s.F, s.D, seed=i) / s.D**0.5 for i in (1, 2))
        return gate, up, self.draw(s.E, s.D, s.F, seed=3) / s.F**0.5

    def contender(self, layer: Layer) -> Contender:
        s = self.shape
        call, parameters, gradients = layer
        x_ND = self.draw(s.N, s.D, seed=4).requires_grad_()
        direction_ND = self.draw(s.N, s.D, seed=5)
        scores_NE = torch.rand(s.N, s.E, generator=torch.Generator().manual_seed(6)).to(self.device)
        chosen = scores_NE.topk(s.K)
        ids_NK = chosen.indices
        g_NK = (chosen.values / chosen.values.sum(-1, keepdim=True)).to(self.dtype).requires_grad_()
        last: list[Tensor] = []

        def run() -> None:
            for leaf in (x_ND, g_NK, *parameters):
                leaf.grad = None
            y_ND = call(x_ND, g_NK, ids_NK)
            y_ND.backward(direction_ND)
            last[:] = [y_ND.detach()]

        def outputs() -> list[Tensor]:
            found = [*last, x_ND.grad, g_NK.grad, *gradients()]
            return [t for t in found if t is not None]

        return Contender(run, outputs)

    def ours(self) -> Layer:
        s = self.shape
        config = MoEConfig(n_routed_experts=s.E, top_k=s.K, d_expert=s.F, d_shared=0)
        layer = RoutedExperts(s.D, config).to(self.device, self.dtype)
        stacks = (layer.w_gate_EFD, layer.w_up_EFD, layer.w_down_EDF)
        _fill(stacks, self.weights())
        return layer, stacks, lambda: [w.grad for w in stacks]

    def olmoe(self, way: str) -> Layer:
        from transformers.models.olmoe.configuration_olmoe import OlmoeConfig
        from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

        s = self.shape
        config = OlmoeConfig(hidden_size=s.D, intermediate_size=s.F, num_experts=s.E, num_experts_per_tok=s.K)
        config._experts_implementation = way
        layer = OlmoeExperts(config).to(self.device, self.dtype)
        gate, up, down = self.weights()
        _fill((layer.gate_up_proj, layer.down_proj), (torch.cat([gate, up], dim=1), down))

        def gradients() -> list[Tensor | None]:
            return [*layer.gate_up_proj.grad.split(s.F, dim=1), layer.down_proj.grad]

        return lambda x, g, ids: layer(x, ids, g), [layer.gate_up_proj, layer.down_proj], gradients

    def sonic(self, way: str) -> Contender:
        """The same sizes in sonic-moe (Python 3.12, CUDA 12.9, Hopper or newer), by one of its three ways."""
        from sonicmoe import KernelBackendMoE, MoE
        from sonicmoe.enums import ActivationType

        s = self.shape
        layer = MoE(
            num_experts=s.E,
            num_experts_per_tok=s.K,
            hidden_size=s.D,
            intermediate_size=s.F,
            activation_function=ActivationType.SWIGLU,
            add_bias=False,
            std=0.02,
        ).to(self.device, self.dtype)
        x_ND = self.draw(s.N, s.D, seed=4).requires_grad_()
        direction_ND = self.draw(s.N, s.D, seed=5)

        def run() -> None:
            x_ND.grad = None
            layer.zero_grad(set_to_none=True)
            y_ND, _ = layer(x_ND, kernel_backend_moe=getattr(KernelBackendMoE, way))
            y_ND.backward(direction_ND)

        return Contender(run)

    def loop(self) -> Layer:
        """Tokens sorted by expert, then one product after the other over their slices."""
        stacks = tuple(w.requires_grad_() for w in self.weights())

        def call(x_ND: Tensor, g_NK: Tensor, ids_NK: Tensor) -> Tensor:
            order_R = ids_NK.flatten().argsort()
            sizes = torch.bincount(ids_NK.flatten(), minlength=self.shape.E).tolist()
            token_R = order_R // ids_NK.shape[1]
            slices = x_ND[token_R].split(sizes)
            outs = [
                F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
                for x, gate, up, down in zip(slices, *(w.unbind() for w in stacks), strict=True)
            ]
            out_RD = torch.cat(outs) * g_NK.flatten()[order_R, None]
            return torch.zeros_like(x_ND).index_add(0, token_R, out_RD)

        return call, stacks, lambda: [w.grad for w in stacks]


def _fill(parameters: Sequence[nn.Parameter | Tensor], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)
