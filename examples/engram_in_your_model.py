"""Engram in a transformer of your own: one memory layer, trained on this file. Runs in seconds on a CPU.

    python examples/engram_in_your_model.py

docs/engram-module.md goes through it line by line.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn

from engram import (
    Engram,
    EngramConfig,
    HashSpec,
    NgramHasher,
    TableConfig,
    compress_vocabulary,
    init_weights,
    prime_slots,
)

V, D = 300, 64


class TinyTransformer(nn.Module):
    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        tables = TableConfig(d_mem=64, n_hash_heads=4, pad_id=0, n_slots=(prime_slots(1000, 8),))  # 2 orders x 4 heads
        memory = EngramConfig(layer_ids=(1,), tables=tables)
        self.hasher = NgramHasher(memory, HashSpec.build(memory, compress_vocabulary(tokenizer, V)))
        self.engram = Engram(memory, layer=0, d_model=D)
        init_weights(self.engram, seed=0, n_layers=2)
        self.embed = nn.Embedding(V, D)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(D, 4, 4 * D, 0.0, batch_first=True) for _ in range(2))
        self.head = nn.Linear(D, V, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        (rows,) = self.hasher(tokens, documents_BT=None)  # one tensor a memory layer
        h = self.blocks[0](self.embed(tokens), mask, is_causal=True)
        h = h + self.engram(h[:, :, None], rows, documents_BT=None)[:, :, 0]  # before block 1; one residual stream
        return self.head(self.blocks[1](h, mask, is_causal=True))


def main(steps: int = 120) -> list[float]:
    torch.manual_seed(0)
    text = Path(__file__).read_text(encoding="utf-8")
    tokenizer = Tokenizer(models.BPE(unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.train_from_iterator([text], trainers.BpeTrainer(vocab_size=V, special_tokens=["?"], show_progress=False))
    tokens = torch.tensor(tokenizer.encode(text).ids)
    model = TinyTransformer(tokenizer)
    tables = {p for name, p in model.named_parameters() if name.endswith("table_SP")}
    others = [p for p in model.parameters() if p not in tables]
    # The paper's choice for tables: Adam at five times the learning rate, without weight decay.
    groups = [{"params": others}, {"params": list(tables), "lr": 5e-3, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    losses = []
    for _ in range(steps):
        starts = torch.randint(len(tokens) - 65, (8,))
        batch = torch.stack([tokens[s : s + 65] for s in starts])
        loss = nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    losses = main()
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f} nats per token")
