"""Write a model so that `transformers` loads it without this package: weights, tokenizer, and the code to run them."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import GenerationConfig, PreTrainedTokenizerFast

from engram.modeling_engram import EngramForCausalLM
from engram.transformer import Transformer

_IMPORT = re.compile(r"^( *)from engram\.(\w+) import", re.MULTILINE)
_HERE = Path(__file__).parent


def dress(
    model: Transformer, tokenizer: Tokenizer, *, bos_id: int, max_positions: int
) -> tuple[EngramForCausalLM, PreTrainedTokenizerFast]:
    """Model and tokenizer as `transformers` knows them; the weights are shared, not copied.

    The tokenizer begins every text with the document token, as in training. A text's end is the beginning of the next
    document, so that the same token ends a generation.

    Args:
        model: with its weights.
        tokenizer: what made its training tokens.
        bos_id: the token that begins a document.
        max_positions: tokens of a training sequence.
    """
    bos = tokenizer.id_to_token(bos_id)
    pad_id = tokenizer.token_to_id("<|pad|>")
    special = {"bos_token_id": bos_id, "eos_token_id": bos_id, "pad_token_id": bos_id if pad_id is None else pad_id}
    coat = EngramForCausalLM.wrap(model, tokenizer, max_positions, **special)
    coat.generation_config = GenerationConfig(**special)
    twin = Tokenizer.from_str(tokenizer.to_str())  # the caller's keeps encoding without a template
    twin.post_processor = TemplateProcessing(
        single=f"{bos}:0 $A:0", pair=f"{bos}:0 $A:0 $B:1", special_tokens=[(bos, bos_id)]
    )
    words = PreTrainedTokenizerFast(
        tokenizer_object=twin,
        bos_token=bos,
        eos_token=bos,
        pad_token=tokenizer.id_to_token(special["pad_token_id"]),
        padding_side="left",
        model_max_length=max_positions,
        clean_up_tokenization_spaces=False,
    )
    return coat, words


def export(
    target: Path, model: Transformer, tokenizer: Tokenizer, card: str, *, bos_id: int, max_positions: int
) -> None:
    """Write the directory, whole or not at all.

    Args:
        target: must not exist.
        model: with its weights, on the CPU or not.
        tokenizer: what made its training tokens.
        card: the model card, README.md.
        bos_id: the token that begins a document.
        max_positions: tokens of a training sequence.

    Raises:
        FileExistsError: `target` is there.
        OSError: the disk is full or not writable; nothing is left behind.
    """
    if target.exists():
        raise FileExistsError(f"{target} exists: move it away, or name another directory")
    draft = target.with_name(f".{target.name}.{os.getpid()}.part")
    coat, words = dress(model, tokenizer, bos_id=bos_id, max_positions=max_positions)
    coat.config.auto_map = {
        "AutoConfig": "configuration_engram.EngramLMConfig",
        "AutoModelForCausalLM": "modeling_engram.EngramForCausalLM",
    }
    coat.config.architectures = ["EngramForCausalLM"]
    shutil.rmtree(draft, ignore_errors=True)  # of an export that was killed
    try:
        draft.mkdir(parents=True)
        coat.save_pretrained(draft)
        words.save_pretrained(draft)
        for name, text in code():
            (draft / name).write_text(text, encoding="utf-8")
        (draft / "README.md").write_text(card, encoding="utf-8")
        draft.rename(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def code() -> Iterator[tuple[str, str]]:
    """The files that a loaded model needs of this package, with imports that hold inside one directory."""
    seen, waiting = set(), ["modeling_engram"]
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        text = (_HERE / f"{module}.py").read_text(encoding="utf-8")
        waiting += sorted(match[2] for match in _IMPORT.finditer(text))
        here = _IMPORT.sub(lambda match: f"{match[1]}from .{_file_of(match[2])} import", text)
        yield f"{_file_of(module)}.py", here


def _file_of(module: str) -> str:
    """`attention` -> `engram_attention`: plain names would look like anybody's."""
    return module if module.endswith("_engram") else f"engram_{module}"
