"""The language model behind the interface of `transformers`: load, save, generate.

A thin coat: `engram.transformer` computes, `engram.decoding` is the cache. What it adds is that nothing is lost on the
way without a word: loading refuses a directory that lacks a weight, whose canonical ids are not those the tables were
trained with, or whose tokenizer was changed.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import cached_file

from engram.configuration_engram import EngramLMConfig, plain
from engram.decoding import DecodeState
from engram.hashing import HashSpec
from engram.loss import cross_entropy
from engram.transformer import Transformer

_CACHE = "cache" if "cache" in {f.name for f in fields(CausalLMOutputWithPast)} else "past_key_values"
"""What this version of `transformers` calls a cache."""


class GenerationState(DecodeState):
    """A DecodeState under the names that `generate` looks for."""

    is_compileable = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.n_slots

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.select(beam_idx)


class EngramForCausalLM(PreTrainedModel, GenerationMixin):
    """A trained model: `AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)`."""

    config_class = EngramLMConfig
    base_model_prefix = "model"
    _no_split_modules = ["Block"]  # noqa: RUF012  # transformers' own form

    def __init__(self, config: EngramLMConfig) -> None:
        super().__init__(config)
        architecture = config.model_config()
        # The canonical ids are no part of config.json: 129,280 numbers. They come with the weights.
        unknown_V = np.zeros(architecture.vocab_size, dtype=np.int64)
        self.model = Transformer(architecture, None if architecture.memory is None else unknown_V)
        if self.model.hasher is not None:
            assert config.hash_spec is not None, "a memory needs its hash"
            self.model.hasher.spec = _spec(config.hash_spec, unknown_V)
        self._keep_hash_with_weights()
        self.post_init()

    @classmethod
    def wrap(cls, model: Transformer, tokenizer: Tokenizer, max_positions: int, **special: Any) -> EngramForCausalLM:
        """Put the coat on a model in memory; its weights are not copied.

        Args:
            model: with its weights.
            tokenizer: what made its training tokens.
            max_positions: tokens of a training sequence.
            special: bos_token_id and the like.
        """
        hash_spec = None
        if (spec := model.hash_spec) is not None:
            hash_spec = {"multipliers": spec.multipliers, "n_slots": spec.n_slots, "pad_id": spec.pad_id}
            hash_spec["compressed_sha256"] = _sha256(spec.compressed_V)
        config = EngramLMConfig(
            architecture=plain(model.config),
            hash_spec=hash_spec,
            tokenizer_sha256=tokenizer_fingerprint(tokenizer),
            max_position_embeddings=max_positions,
            **special,
        )
        with torch.device("meta"):
            coat = cls(config)
        coat.model = model
        coat._keep_hash_with_weights()
        return coat.eval()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load, and refuse what would compute something else than was trained.

        Raises:
            ValueError: a weight is missing, left over or of another shape; the canonical ids or the tokenizer are not
                those of the training.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if keys := sorted(map(str, info[what])):
                raise ValueError(f"{pretrained_model_name_or_path}: {what.replace('_', ' ')} {', '.join(keys[:5])}")
        _align(model)
        model._take_up_hash()
        _check_tokenizer(str(pretrained_model_name_or_path), model.config.tokenizer_sha256)
        return (model, info) if wants_info else model

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cache: GenerationState | None = None,
        past_key_values: GenerationState | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits [B, T, V], with `labels` the loss, and with `use_cache=True` what was read.

        Args:
            input_ids: [B, T], the new tokens only where there is a cache.
            attention_mask: [B, slots read and new]: 0 for padding, which stands on the left; on the right it needs no
                mask, since a token sees nothing behind it.
            labels: [B, T], equal to the inputs, -100 where no loss is wanted; shifted inside.
            use_cache: keep keys, windows and convolution inputs.
            cache: what was read before; earlier versions of `transformers` call it `past_key_values`.
            past_key_values: see `cache`.
            logits_to_keep: of the last positions only; 0 is all.
            return_dict: taken for granted.

        Raises:
            ValueError: padding between tokens, or on the right of a text that goes on; weights that were never loaded.
        """
        self._check_hash_was_loaded()
        state = cache if cache is not None else past_key_values
        if state is None:
            n_padding_B = _left_padding(attention_mask, goes_on=bool(use_cache))
            if use_cache or n_padding_B is not None:
                state = GenerationState(self.model.config, n_padding_B)
        # Rows of the `random-ids` control depend on a sequence's number. One number for all, which no training sequence
        # has, makes scores independent of how sequences are batched.
        draws_B = torch.full(input_ids.shape[:1], -1, device=input_ids.device) if self._reads_at_random else None
        x_BTD = self.model.hidden(input_ids, draws_B, state)
        logits_BTV = F.linear(x_BTD[:, -logits_to_keep:], self.model.head_VD)
        loss = None
        if labels is not None:
            targets_BT, wanted_BT = labels[:, 1:], labels[:, 1:] != -100
            loss = cross_entropy(x_BTD[:, :-1][wanted_BT], self.model.head_VD, targets_BT[wanted_BT])
        return CausalLMOutputWithPast(loss=loss, logits=logits_BTV, **{_CACHE: state if use_cache else None})

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """What `generate` hands to `forward`: with a cache, the tokens that it has not read."""
        state = kwargs.get(_CACHE)
        return {
            "input_ids": input_ids if state is None else input_ids[:, state.n_slots :],
            "attention_mask": attention_mask,
            "use_cache": use_cache,
            "logits_to_keep": kwargs.get("logits_to_keep", 0),
            _CACHE: state,
        }

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # that one holds keys and values alone

    def get_input_embeddings(self) -> nn.Module | None:
        """None: the embedding is a parameter of the model, `model.embed_VD`, and no module that could be exchanged."""
        return None

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: weights come from a run. What a directory lacks is an error in `from_pretrained`."""

    @property
    def _reads_at_random(self) -> bool:
        hasher = self.model.hasher
        return hasher is not None and hasher.tables.lookup == "random"

    def _keep_hash_with_weights(self) -> None:
        if (hasher := self.model.hasher) is not None:
            for name in ("compressed_V", "sizes_LG"):
                hasher.register_buffer(name, getattr(hasher, name), persistent=True)

    def _take_up_hash(self) -> None:
        """Compare the canonical ids that came with the weights, and go on with them.

        Raises:
            ValueError: they are others than the tables were trained with.
        """
        if (hasher := self.model.hasher) is None:
            return
        compressed_V, stored = hasher.compressed_V.cpu().numpy(), self.config.hash_spec
        if _sha256(compressed_V) != stored["compressed_sha256"]:
            raise ValueError("the canonical ids in the weights are not those that the tables were trained with")
        spec = _spec(stored, compressed_V)
        if hasher.sizes_LG.tolist() != [list(sizes) for sizes in spec.n_slots]:
            raise ValueError("the table sizes in the weights are not those of config.json")
        hasher.spec = spec

    def _check_hash_was_loaded(self) -> None:
        hasher = self.model.hasher
        if hasher is not None and not hasher.spec.compressed_V.any():
            raise ValueError("this model was built from a config: its hash comes with the weights, use from_pretrained")


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """sha256 of all that decides which tokens a text becomes; not of padding, truncation and templates."""
    parts = json.loads(tokenizer.to_str())
    decisive = {key: parts[key] for key in ("model", "normalizer", "pre_tokenizer")}
    added = [[token["id"], token["content"], token["special"]] for token in parts["added_tokens"]]
    text = json.dumps([decisive, sorted(added)], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _align(model: nn.Module) -> None:
    """Copy weights to where torch itself would have put them.

    Loaded ones lie in the file's image at odd addresses, where CPU kernels add in another order: the last bit differed.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % 64:
            parameter.data = parameter.data.clone()


def _check_tokenizer(source: str, expected: str | None) -> None:
    """Compare the tokenizer that lies beside the weights, if one does.

    Raises:
        ValueError: it is another.
    """
    path = cached_file(source, "tokenizer.json", _raise_exceptions_for_missing_entries=False)
    if path is None or expected is None:
        return
    if (found := tokenizer_fingerprint(Tokenizer.from_file(path))) != expected:
        raise ValueError(
            f"{source}: tokenizer.json is not the tokenizer that the model was trained with (fingerprint "
            f"{found[:12]}, trained with {expected[:12]}): its tables would be read with another hash"
        )


def _left_padding(mask_BT: Tensor | None, *, goes_on: bool) -> Tensor | None:
    """Slots of padding on each sequence's left; None if there are none."""
    if mask_BT is None or bool(mask_BT.all()):
        return None
    real_BT = mask_BT != 0
    n_padding_B = (real_BT.cumsum(-1) == 0).sum(-1)
    slots_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    last_B = (real_BT * slots_T).amax(-1)
    between = (slots_T >= n_padding_B[:, None]) & (slots_T <= last_B[:, None])
    if not torch.equal(real_BT, between):
        raise ValueError("attention_mask has holes: padding may stand on the left or on the right of a text only")
    if goes_on and bool((last_B < mask_BT.shape[1] - 1).any()):
        raise ValueError('padding on the right of a text that goes on: set tokenizer.padding_side = "left"')
    return n_padding_B if bool(n_padding_B.any()) else None


def _spec(stored: dict[str, Any], compressed_V: npt.NDArray[np.int64]) -> HashSpec:
    return HashSpec(
        compressed_V=compressed_V,
        multipliers=tuple(tuple(numbers) for numbers in stored["multipliers"]),
        n_slots=tuple(tuple(sizes) for sizes in stored["n_slots"]),
        pad_id=stored["pad_id"],
    )


def _sha256(compressed_V: npt.NDArray[np.int64]) -> str:
    return hashlib.sha256(np.ascontiguousarray(compressed_V).tobytes()).hexdigest()
