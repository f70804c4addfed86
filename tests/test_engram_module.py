"""If these fail, Engram cannot be used in a model of one's own as its page says."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import compressed_vocabulary, tiny_engram

import engram
from engram import Engram, EngramConfig, HashSpec, NgramHasher, TableConfig, init_weights

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "engram_in_your_model.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("engram_in_your_model", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_learns(example: ModuleType) -> None:
    """From about ln 300 = 5.7 to less than half of it."""
    losses = example.main()
    assert losses[0] > 4.5
    assert losses[-1] < 0.5 * losses[0]


def test_the_page_quotes_the_example() -> None:
    """Every line of code on the page, up to spaces and `self.`, is the example's."""

    def bare(text: str) -> str:
        return re.sub(r"\s|self\.|#.*", "", text)

    page = (ROOT / "docs" / "engram-module.md").read_text()
    quoted = [line for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
    lines = {bare(line) for line in EXAMPLE.read_text().splitlines()}
    assert [line for line in quoted if bare(line) not in lines] == []


def test_importing_the_package_waits_for_no_torch() -> None:
    """Counting whole grids must stay a matter of milliseconds."""
    code = "import sys, engram, engram.counting, engram.allocation; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_every_public_name_is_there_and_no_other() -> None:
    assert all(getattr(engram, name) is not None for name in engram.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Engramm'"):
        _ = engram.Engramm


def test_the_module_alone_is_causal_trains_all_its_parameters_and_is_initialised() -> None:
    config = tiny_engram()
    hasher = NgramHasher(config, HashSpec.build(config, compressed_vocabulary()))
    memory = Engram(config, layer=1, d_model=32)
    init_weights(memory, seed=0, n_layers=3)
    assert all(p.isfinite().all() for p in memory.parameters())
    tokens_BT, h_BTMD = torch.randint(2, 64, (2, 20)), torch.randn(2, 20, 1, 32)
    torch.nn.init.normal_(memory.get_parameter("conv.conv_JMD"))  # zero at first: it would hide what it reads
    rows = hasher(tokens_BT, None)[1]
    before = memory(h_BTMD, rows, None)
    before.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in memory.parameters())
    tokens_BT[:, 11] = (tokens_BT[:, 11] + 30) % 64
    moved_T = (memory(h_BTMD, hasher(tokens_BT, None)[1], None) != before).flatten(2).any(-1).any(0)
    assert moved_T.nonzero().min() == 11


def test_tables_without_sizes_are_refused() -> None:
    unsized = EngramConfig(layer_ids=(0,), tables=TableConfig(d_mem=16, n_hash_heads=2))
    with pytest.raises(ValueError, match=r"layer=0 has no tables, n_slots sizes 0 layers: set tables\.n_slots"):
        Engram(unsized, layer=0, d_model=32)
