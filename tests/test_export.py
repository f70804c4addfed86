"""If these fail, a model that was handed on computes something else than was trained, or loses its memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import awake_model, tiny_config, tiny_engram, tiny_tables
from tokenizers import Tokenizer

from engram.config import ModelConfig, OverEncodingConfig
from engram.hashing import compress_vocabulary
from engram.initialise import init_weights
from engram.transformer import Transformer
from experiments.tokenizers import train_bpe

pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file

from engram.export import code, dress, export
from engram.modeling_engram import EngramForCausalLM, tokenizer_fingerprint

HERE = Path(__file__).parent
V, LENGTH = 300, 40
ARMS = {
    "engram": tiny_config(vocab_size=V, bos_id=0, engram=tiny_engram(), n_streams=4),
    "over-encoding": tiny_config(
        vocab_size=V, bos_id=0, over_encoding=OverEncodingConfig(tables=tiny_tables(n_slots=((31, 37, 41, 43),)))
    ),
    "random lookups": tiny_config(
        vocab_size=V, bos_id=0, engram=tiny_engram(tables=tiny_tables(lookup="random")), moe=None
    ),
    "dense": tiny_config(vocab_size=V, bos_id=0, moe=None),
}


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    text = Path(__file__).read_text()
    return train_bpe(iter([text] * 3), V)


def awake(config: ModelConfig, tokenizer: Tokenizer) -> Transformer:
    """A model with the tokenizer's own hash and noise on every parameter."""
    model = Transformer(config, compress_vocabulary(tokenizer, V) if config.memory else None)
    init_weights(model, 0)
    noisy = awake_model(config) if config.memory is None else None
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    assert noisy is None or noisy.config == config
    return model.eval()


def text_tokens() -> torch.Tensor:
    tokens_BT = torch.randint(3, V, (2, LENGTH), generator=torch.Generator().manual_seed(3))
    tokens_BT[:, 0] = tokens_BT[1, 9] = 0
    return tokens_BT


def write(target: Path, model: Transformer, tokenizer: Tokenizer) -> Path:
    export(target, model, tokenizer, "# A card\n", bos_id=0, max_positions=64)
    return target


def seen_by_a_stranger(directory: Path, tmp_path: Path) -> dict[str, Any]:
    """Load it in another process, elsewhere, where `engram` cannot be imported."""
    torch.save(text_tokens(), tmp_path / "tokens.pt")
    (elsewhere := tmp_path / "elsewhere").mkdir()
    script = (HERE / "exported.py").read_text()
    command = [sys.executable, "-c", script, str(directory), str(tmp_path / "tokens.pt"), str(tmp_path / "out.pt")]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(torch.load(tmp_path / "out.pt"))


@pytest.mark.parametrize("name", [n if n == "engram" else pytest.param(n, marks=pytest.mark.slow) for n in ARMS])
def test_a_stranger_gets_the_same_model(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Logits to the bit; cached, uncached, padded and unpadded texts agree; every parameter trains and is saved."""
    model = awake(ARMS[name], tokenizer)
    seen = seen_by_a_stranger(write(tmp_path / "model", model, tokenizer), tmp_path)
    tokens_BT = text_tokens()
    # One number for all sequences, as the export has it, matters to random lookups only.
    with torch.no_grad():
        expected = model(tokens_BT, draws_B=torch.full((2,), -1))
    assert torch.equal(seen["logits"], expected)
    loss = F.cross_entropy(expected[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten())
    assert seen["loss"] == pytest.approx(float(loss), rel=1e-5)

    assert torch.equal(seen["cached"], seen["uncached"])
    assert torch.equal(seen["beams"], seen["beams_uncached"])
    assert torch.equal(seen["cached"][:, -12:], seen["alone"])
    assert seen["not_trainable"] == seen["not_moved"] == []
    assert seen["round_trip"]
    assert seen["module"].startswith("transformers_modules.")
    assert seen["max_length"] == 64
    assert seen["ids"] == [0, *tokenizer.encode("x = 1", add_special_tokens=False).ids]
    assert seen["text"] == "x = 1"


def test_the_directory_holds_code_weights_hash_and_card(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = awake(ARMS["engram"], tokenizer)
    directory = write(tmp_path / "model", model, tokenizer)
    config = json.loads((directory / "config.json").read_text())
    assert model.hash_spec is not None
    assert [tuple(numbers) for numbers in config["hash_spec"]["multipliers"]] == list(model.hash_spec.multipliers)
    assert config["architecture"]["engram"]["tables"]["n_slots"] == [list(sizes) for sizes in model.hash_spec.n_slots]
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_engram.EngramForCausalLM"
    weights = load_file(directory / "model.safetensors")
    assert set(weights) == {f"model.{n}" for n in model.state_dict()} | {
        "model.hasher.compressed_V",
        "model.hasher.sizes_LG",
    }
    assert (directory / "README.md").read_text() == "# A card\n"
    assert not list(tmp_path.glob(".model*"))
    assert "from engram" not in "".join(text for _, text in code())


def test_an_existing_directory_is_left_alone(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="model exists: move it away"):
        write(tmp_path / "model", awake(ARMS["dense"], tokenizer), tokenizer)
    assert [p.name for p in (tmp_path / "model").iterdir()] == ["mine.txt"]


def test_a_failed_export_leaves_nothing(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, *args: Any, **kwargs: Any) -> int:
        raise OSError(28, "No space left on device")

    model = awake(ARMS["dense"], tokenizer)
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "model", model, tokenizer)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def exported(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    return write(tmp_path / "model", awake(ARMS["engram"], tokenizer), tokenizer)


def test_a_changed_tokenizer_is_an_error(exported: Path) -> None:
    path = exported / "tokenizer.json"
    parts = json.loads(path.read_text())
    first, second = parts["model"]["merges"][:2]
    parts["model"]["merges"][:2] = [second, first]  # same vocabulary, other pieces
    path.write_text(json.dumps(parts))
    with pytest.raises(ValueError, match=r"tokenizer\.json is not the tokenizer that the model was trained with"):
        EngramForCausalLM.from_pretrained(exported)


def test_a_padded_and_truncated_tokenizer_is_no_other_tokenizer(tokenizer: Tokenizer) -> None:
    twin = Tokenizer.from_str(tokenizer.to_str())
    twin.enable_padding()
    twin.enable_truncation(7)
    assert tokenizer_fingerprint(twin) == tokenizer_fingerprint(tokenizer)


@pytest.mark.parametrize("change", ["lost", "left over", "other ids", "other sizes"])
def test_weights_that_are_not_the_models_are_an_error(change: str, exported: Path) -> None:
    path = exported / "model.safetensors"
    weights = load_file(path)
    table = "model.blocks.0.engram.tables.table_SP"
    if change == "lost":
        del weights[table]
    elif change == "left over":
        weights[table.replace("blocks.0", "blocks.1")] = weights[table].clone()
    elif change == "other ids":
        weights["model.hasher.compressed_V"][7] += 1
    else:
        weights["model.hasher.sizes_LG"][0, 0] += 2
    save_file(weights, path, metadata={"format": "pt"})
    expected = {
        "lost": f"missing keys {table}",
        "left over": "unexpected keys model.blocks.1.engram",
        "other ids": "canonical ids in the weights are not those",
        "other sizes": "table sizes in the weights are not those",
    }
    with pytest.raises(ValueError, match=expected[change]):
        EngramForCausalLM.from_pretrained(exported)


def test_a_model_built_from_a_config_alone_does_not_compute(exported: Path) -> None:
    config = EngramForCausalLM.from_pretrained(exported).config
    with pytest.raises(ValueError, match="its hash comes with the weights, use from_pretrained"):
        EngramForCausalLM(config)(text_tokens())


def test_an_unknown_setting_of_a_later_version_is_an_error(exported: Path) -> None:
    path = exported / "config.json"
    config = json.loads(path.read_text())
    config["architecture"]["engram"]["tables"]["colour"] = "blue"
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="does not know colour in TableConfig"):
        EngramForCausalLM.from_pretrained(exported)


def test_masks_that_cannot_be_meant_are_refused(tokenizer: Tokenizer) -> None:
    coat, _ = dress(awake(ARMS["dense"], tokenizer), tokenizer, bos_id=0, max_positions=64)
    tokens_BT, mask_BT = text_tokens(), torch.ones(2, LENGTH, dtype=torch.long)
    mask_BT[1, 5] = 0
    with pytest.raises(ValueError, match="attention_mask has holes"):
        coat(tokens_BT, attention_mask=mask_BT)
    mask_BT[1, 5], mask_BT[1, -3:] = 1, 0
    with pytest.raises(ValueError, match='padding_side = "left"'):
        coat(tokens_BT, attention_mask=mask_BT, use_cache=True)
    with torch.no_grad():  # a text that ends there needs no mask
        assert torch.equal(coat(tokens_BT, attention_mask=mask_BT).logits, coat(tokens_BT).logits)


def test_a_coat_shares_the_models_weights(tokenizer: Tokenizer) -> None:
    model = awake(replace(ARMS["engram"]), tokenizer)
    coat, words = dress(model, tokenizer, bos_id=0, max_positions=64)
    assert all(p is q for p, q in zip(coat.model.parameters(), model.parameters(), strict=True))
    assert words.padding_side == "left"
    assert tokenizer.encode("x").ids == tokenizer.encode("x", add_special_tokens=False).ids
