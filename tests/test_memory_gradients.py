"""If these fail, the gradients written out for Engram's gate and convolution are not those of their formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engram.memory_gradients import causal_convolution, gate_score

B, T, M, D, EPS = 2, 11, 3, 8, 1e-6


def draw(*shape: int, seed: int) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.requires_grad_()


DOCUMENTS = torch.tensor([[0] * 4 + [1] * 7, [0] * 11])


def score_of_two_norms(h: Tensor, k: Tensor, gain_query: Tensor, gain_key: Tensor) -> Tensor:
    """Eq. 4's score as it is printed."""
    normed_h, normed_k = (F.rms_norm(x, (D,), eps=EPS) * gain for x, gain in ((h, gain_query), (k, gain_key)))
    return (normed_h * normed_k).sum(-1, keepdim=True) / D**0.5


def convolution_by_token(x: Tensor, w: Tensor, dilation: int, documents: Tensor | None) -> Tensor:
    """One output after another."""
    y = torch.zeros_like(x)
    for b in range(B):
        for t in range(T):
            for j in range(len(w)):
                s = t - j * dilation
                if s >= 0 and (documents is None or documents[b, s] == documents[b, t]):
                    y[b, t] = y[b, t] + w[j] * x[b, s]
    return y


def assert_equal_with_gradients(here: Tensor, there: Tensor, operands: list[Tensor]) -> None:
    """Values and gradients, in double precision."""
    torch.testing.assert_close(here, there, rtol=1e-12, atol=1e-12)
    direction = draw(*here.shape, seed=9).detach()
    ours, plain = (torch.autograd.grad((y * direction).sum(), operands) for y in (here, there))
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_score_and_its_gradients_equal_those_of_two_norms_and_a_product() -> None:
    operands = [draw(B, T, M, D, seed=1), draw(B, T, M, D, seed=2), draw(M, D, seed=3), draw(M, D, seed=4)]
    assert_equal_with_gradients(gate_score(*operands, EPS), score_of_two_norms(*operands), operands)


@pytest.mark.parametrize(
    ("wide", "tolerance"), [(torch.float32, 5e-3), (torch.bfloat16, 2e-2)], ids=["bf16 keys only", "all in bf16"]
)
def test_score_of_bf16_operands_is_near_that_in_fp32(wide: torch.dtype, tolerance: float) -> None:
    """As under autocast (streams and gains in fp32), and in a model cast to bf16; relative to the norm."""
    shapes = ((B, T, M, D), (B, T, M, D), (M, D), (M, D))
    exact = [draw(*shape, seed=i).detach().bfloat16().double().requires_grad_() for i, shape in enumerate(shapes)]
    dtypes = (wide, torch.bfloat16, wide, wide)
    rough = [x.detach().to(dtype).requires_grad_() for x, dtype in zip(exact, dtypes, strict=True)]
    there, here = score_of_two_norms(*exact), gate_score(*rough, EPS)
    direction = draw(*there.shape, seed=9).detach()
    pairs = [(here, there)]
    pairs += zip(
        torch.autograd.grad((here * direction).sum(), rough),
        torch.autograd.grad((there * direction).sum(), exact),
        strict=True,
    )
    for a, b in pairs:
        assert (a.double() - b).norm() < tolerance * b.norm()


@pytest.mark.parametrize("documents_BT", [None, DOCUMENTS], ids=["one text", "documents"])
@pytest.mark.parametrize("dilation", [1, 3, 20])
def test_convolution_and_its_gradients_equal_those_token_by_token(dilation: int, documents_BT: Tensor | None) -> None:
    operands = [draw(B, T, M, D, seed=1), draw(4, M, D, seed=2)]
    here = causal_convolution(*operands, dilation, documents_BT)
    there = convolution_by_token(*operands, dilation, documents_BT)
    assert_equal_with_gradients(here, there, operands)
