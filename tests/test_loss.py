"""If these fail, models train on a loss or gradients that are not the cross-entropy's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import engram.loss
from engram.loss import cross_entropy, token_losses

N, D, V = 37, 16, 50


def operands(scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states and head, leaves that want gradients, and targets."""
    generator = torch.Generator().manual_seed(0)
    x_ND = (scale * torch.randn(N, D, generator=generator)).requires_grad_()
    head_VD = torch.randn(V, D, generator=generator).requires_grad_()
    return x_ND, head_VD, torch.randint(0, V, (N,), generator=generator)


@pytest.fixture(params=[1, 5, 36, 37, 1000])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Tokens a chunk: one, a divisor of nothing, all but one, all, more than there are."""
    monkeypatch.setattr(engram.loss, "CHUNK_LOGITS", {"cpu": request.param * V, "cuda": V})
    monkeypatch.setattr(engram.loss, "MIN_CHUNK", 1)
    size: int = request.param
    return size


@pytest.mark.usefixtures("chunk")
def test_value_and_gradients_equal_torchs() -> None:
    x_ND, head_VD, targets_N = operands()
    ours = cross_entropy(x_ND, head_VD, targets_N)
    theirs = F.cross_entropy(x_ND @ head_VD.T, targets_N)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    grads = torch.autograd.grad(3 * ours, (x_ND, head_VD)), torch.autograd.grad(3 * theirs, (x_ND, head_VD))
    for here, there in zip(*grads, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("chunk")
def test_value_without_gradients_is_the_same() -> None:
    x_ND, head_VD, targets_N = operands()
    with torch.no_grad():
        loss = cross_entropy(x_ND, head_VD, targets_N)
    assert torch.equal(loss, cross_entropy(x_ND, head_VD, targets_N).detach())


@pytest.mark.usefixtures("chunk")
def test_bf16_autocast_is_near_fp32() -> None:
    """Logits of bf16 operands: the value within 1 percent, gradients within 2 percent of their norm."""
    x_ND, head_VD, targets_N = operands()
    exact = F.cross_entropy(x_ND @ head_VD.T, targets_N)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = cross_entropy(x_ND, head_VD, targets_N)
    assert rough.dtype == torch.float32
    assert rough.item() == pytest.approx(exact.item(), rel=0.01)
    grads = torch.autograd.grad(rough, (x_ND, head_VD)), torch.autograd.grad(exact, (x_ND, head_VD))
    for here, there in zip(*grads, strict=True):
        assert here.dtype == torch.float32
        assert (here - there).norm() < 0.02 * there.norm()


def test_large_logits_do_not_overflow() -> None:
    x_ND, head_VD, targets_N = operands(scale=1e4)
    loss = cross_entropy(x_ND, head_VD, targets_N)
    torch.testing.assert_close(loss, F.cross_entropy(x_ND @ head_VD.T, targets_N))
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (x_ND, head_VD)))


@pytest.mark.parametrize("frozen", [0, 1], ids=["hidden", "head"])
def test_a_frozen_operand_does_not_disturb_the_others_gradient(frozen: int) -> None:
    leaves = list(operands()[:2])
    targets_N = operands()[2]
    full = torch.autograd.grad(cross_entropy(*leaves, targets_N), leaves)
    leaves[frozen] = leaves[frozen].detach()
    (alone,) = torch.autograd.grad(cross_entropy(*leaves, targets_N), leaves[1 - frozen])
    assert torch.equal(alone, full[1 - frozen])


def test_uniform_logits_cost_log_v() -> None:
    _, head_VD, targets_N = operands()
    loss = cross_entropy(torch.zeros(N, D), head_VD, targets_N)
    assert loss.item() == pytest.approx(torch.tensor(float(V)).log().item(), rel=1e-6)


def test_second_derivatives_are_refused_rather_than_wrong() -> None:
    x_ND, head_VD, targets_N = operands()
    loss = cross_entropy(x_ND, head_VD, targets_N).square()
    (grad,) = torch.autograd.grad(loss, x_ND, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.usefixtures("chunk")
def test_losses_of_tokens_are_torchs_and_their_mean_is_the_loss() -> None:
    x_ND, head_VD, targets_N = operands()
    losses_N = token_losses(x_ND, head_VD, targets_N)
    torch.testing.assert_close(losses_N, F.cross_entropy(x_ND @ head_VD.T, targets_N, reduction="none").detach())
    torch.testing.assert_close(losses_N.mean(), cross_entropy(x_ND, head_VD, targets_N).detach())
    assert not losses_N.requires_grad
