"""A finished run -> a directory that `transformers` loads anywhere (`engram.export`), with a model card."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from experiments.finished import Finished
from experiments.loading import save_run
from experiments.settings import UserError


def export_run(finished: Finished, target: Path) -> Path:
    """Write the directory, whole or not at all.

    Raises:
        UserError: `target` exists, `transformers` is not installed, or the run's weights are gone.
        OSError: the disk is full or not writable.
    """
    if target.exists():
        raise UserError(f"{target} exists: move it away, or name another directory")
    try:
        from engram.export import export
    except ImportError as error:
        raise UserError(f"export needs transformers ({error}): pip install -c constraints.txt -e '.[hf]'") from error
    export(
        target,
        finished.load_model(),
        finished.shards.tokenizer,
        model_card(finished),
        bos_id=finished.shards.bos_id,
        max_positions=finished.run.spec.train.seq_len,
    )
    return target


def model_card(finished: Finished) -> str:
    """What a stranger must know of the model: what it is, what it was trained on, what it cannot do."""
    run, result, cost = finished.run, finished.final["result"], finished.final["cost"]
    labels = run.labels
    rows = {
        "run": run.spec.run_id,
        "arm": labels.arm + (" (strict)" if labels.mode == "strict" else ""),
        "rho, the experts' share of the sparse parameters": "-" if labels.rho is None else f"{labels.rho:.4f}",
        "seed": run.spec.seed,
        "P_tot (without embedding and head)": f"{result['P_tot']:,}",
        "P_act (used by one token)": f"{result['P_act']:,}",
        "P_engram (table rows not read)": f"{result['P_engram']:,}",
        "P_vocab (embedding and head)": f"{result['P_vocab']:,}",
        "training tokens": f"{result['train_tokens']:,} ({result['epochs']:.2f} epochs)",
        "training FLOPs": f"{result['flops']:.3g}",
        "text": f"{result['corpus']} (shards {run.spec.data[:12]})",
        "validation loss": f"{result['valid_loss']:.4f} nats per token, {result['valid_bpb']:.4f} bits per byte",
        "code": f"{cost['commit']}{', with uncommitted changes' if cost['dirty'] else ''}, schema {run.spec.schema}",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [engram, mixture-of-experts, n-gram-memory]
---

# {labels.arm} of the study {labels.budget}, run {run.spec.run_id}

A model from a study of how sparse capacity is best split between experts and n-gram memory, after Engram
(arXiv 2601.07372). It was trained to be compared with others of its study, not to be used.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # where this card lies
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model.generate(**tokenizer("Once", return_tensors="pt"), max_new_tokens=20)
```

| | |
| --- | --- |
{table}

It saw sequences of {run.spec.train.seq_len} tokens, each document beginning with the tokenizer's `bos_token`, and was
{"trained in fp32" if run.spec.train.precision == "fp32" else "trained under bf16 autocast"}; these weights are fp32.
Which rows of its tables a text reads depends on the tokenizer: loading compares both, and refuses another one. Training
it further moves all weights, tables included, but not the router's balancing biases.

## The run

```yaml
{_spec(finished)}```
"""


def _spec(finished: Finished) -> str:
    with TemporaryDirectory() as folder:
        save_run(finished.run, path := Path(folder) / "config.yaml")
        return path.read_text()
