"""If these fail, weight matrices move otherwise than under Muon, or an expert's update depends on its neighbours.

The oracle is `torch.optim.Muon`, one matrix at a time. It iterates in bf16, and so does ours here. Batched and single
products may round differently in bf16, which keeps 8 bits: after 5 steps the difference may be 1e-2 of the way that the
weights went.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from engram.muon import Muon, newton_schulz


def copies(tensors: list[Tensor]) -> list[nn.Parameter]:
    return [nn.Parameter(tensor.clone()) for tensor in tensors]


def run_muon(weights: list[Tensor], gradients: list[list[Tensor]], dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    ours = copies(weights)
    optimizer = Muon(ours, lr=0.02, momentum=0.95, weight_decay=0.1, dtype=dtype)
    for step in gradients:
        for p, gradient in zip(ours, step, strict=True):
            p.grad = gradient.clone()
        optimizer.step()
    return [p.detach() for p in ours]


def run_torch_muon(weights: list[Tensor], gradients: list[list[Tensor]]) -> list[Tensor]:
    theirs = copies(weights)
    optimizer = torch.optim.Muon(theirs, lr=0.02, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in gradients:
        for p, gradient in zip(theirs, step, strict=True):
            p.grad = gradient.clone()
        optimizer.step()
    return [p.detach() for p in theirs]


def relative_error(got: Tensor, expected: Tensor, start: Tensor) -> float:
    """Size of the difference over the way that the weights went."""
    return float((got - expected).norm() / (expected - start).norm())


@pytest.mark.parametrize("shapes", [[(64, 64)], [(24, 96)], [(96, 24)], [(1, 40)], [(24, 96)] * 3 + [(96, 24)] * 2])
def test_muon_on_matrices_equals_torch_muon(shapes: list[tuple[int, int]]) -> None:
    torch.manual_seed(0)
    weights = [torch.randn(shape) / 10 for shape in shapes]
    gradients = [[torch.randn(shape) for shape in shapes] for _ in range(5)]
    expected = run_torch_muon(weights, gradients)
    for got, want, start in zip(run_muon(weights, gradients), expected, weights, strict=True):
        assert relative_error(got, want, start) < 1e-2


def test_parts_of_a_stack_that_go_through_the_iteration_apart_are_put_together_in_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights, gradients = [torch.randn(5, 4, 8), torch.randn(4, 8)], [[torch.randn(5, 4, 8), torch.randn(4, 8)]]
    whole = run_muon(weights, gradients)
    monkeypatch.setattr("engram.muon.CPU_MATRICES", 2)
    for parts, at_once in zip(run_muon(weights, gradients), whole, strict=True):
        torch.testing.assert_close(parts, at_once, rtol=0, atol=1e-7)


@pytest.mark.parametrize("shape", [(16, 48), (48, 16)])
def test_muon_on_a_stack_of_experts_equals_torch_muon_on_each(shape: tuple[int, int]) -> None:
    # Gradients of very different size: a norm taken over the whole stack would starve the small experts.
    torch.manual_seed(1)
    scales = torch.tensor([1e-4, 1e-2, 1.0, 1e2])[:, None, None]
    stack = torch.randn(4, *shape) / 10
    gradients = [torch.randn(4, *shape) * scales for _ in range(5)]
    got = run_muon([stack], [[gradient] for gradient in gradients])[0]
    expected = run_torch_muon(list(stack.unbind()), [list(gradient.unbind()) for gradient in gradients])
    for e in range(4):
        assert relative_error(got[e], expected[e], stack[e]) < 1e-2


def test_the_iteration_keeps_fp32() -> None:
    """Against the same steps in double precision: 1e-5 of the way, a hundredth of what bf16 would leave."""
    assert Muon([nn.Parameter(torch.ones(2, 2))], lr=0.1, momentum=0.9, weight_decay=0.0).dtype == torch.float32
    weights, gradients = [torch.randn(24, 96) / 10], [[torch.randn(24, 96)] for _ in range(5)]
    got = run_muon(weights, gradients, torch.float32)[0]
    exact = run_muon([weights[0].double()], [[g.double() for g in step] for step in gradients], torch.float64)[0]
    assert relative_error(got.double(), exact, weights[0].double()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_newton_schulz_keeps_singular_vectors_and_brings_singular_values_near_one(dtype: torch.dtype) -> None:
    # Jordan 2024: the quintic oscillates about 1, between 0.7 and 1.2; bf16 blurs that by 0.05.
    G = torch.randn(3, 32, 80, generator=torch.Generator().manual_seed(0))
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    core = U.mT @ newton_schulz(G.to(dtype)).float() @ Vh.mT
    values = core.diagonal(dim1=-2, dim2=-1)
    assert values.min() > 0.65
    assert values.max() < 1.25
    assert (core - torch.diag_embed(values)).abs().max() < 0.05


def test_an_expert_without_gradient_or_history_is_only_decayed() -> None:
    stack = torch.ones(2, 4, 8)
    gradient = torch.stack([torch.zeros(4, 8), torch.randn(4, 8, generator=torch.Generator().manual_seed(0))])
    got = run_muon([stack], [[gradient]])[0]
    torch.testing.assert_close(got[0], torch.full((4, 8), 1 - 0.02 * 0.1), rtol=1e-6, atol=0)


def test_a_momentum_outside_its_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"momentum=1.0 must lie in \[0, 1\)"):
        Muon([nn.Parameter(torch.ones(2, 2))], lr=0.1, momentum=1.0, weight_decay=0.0)
