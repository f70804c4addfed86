"""Runs where this package cannot be imported: loads an exported directory as a stranger would, and writes what it saw.

python exported.py DIR TOKENS.pt OUT.pt
"""

import sys

sys.modules["engram"] = None  # type: ignore[assignment]  # from here on, importing it is an error

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402


def main(directory: str, tokens_path: str, out: str) -> None:
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    words = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
    tokens_BT = torch.load(tokens_path)
    with torch.no_grad():
        logits_BTV = model(tokens_BT).logits
    prompts = ["the model", "def f(x):\n    return", "a"]
    padded = words(prompts, return_tensors="pt", padding=True)
    greedy = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}
    cached = model.generate(**padded, **greedy)
    uncached = model.generate(**padded, **greedy, use_cache=False)
    alone = [model.generate(**words(prompt, return_tensors="pt"), **greedy)[0, -12:] for prompt in prompts]
    beams = model.generate(**padded, **greedy, num_beams=3)
    beams_uncached = model.generate(**padded, **greedy, num_beams=3, use_cache=False)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    model.train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    loss = model(tokens_BT, labels=tokens_BT).loss
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    model.save_pretrained(f"{directory}-again")
    words.save_pretrained(f"{directory}-again")
    again = AutoModelForCausalLM.from_pretrained(f"{directory}-again", trust_remote_code=True)
    model.eval()
    with torch.no_grad():
        twice = torch.equal(again(tokens_BT).logits, model(tokens_BT).logits)
        changed = not torch.equal(again(tokens_BT).logits, logits_BTV)
    torch.save(
        {
            "logits": logits_BTV,
            "loss": float(loss),
            "ids": words("x = 1", add_special_tokens=True)["input_ids"],
            "text": words.decode(words("x = 1")["input_ids"], skip_special_tokens=True),
            "cached": cached,
            "uncached": uncached,
            "alone": torch.stack(alone),
            "beams": beams,
            "beams_uncached": beams_uncached,
            "not_trainable": sorted(set(before) - trainable),
            "not_moved": sorted(set(before) - moved),
            "round_trip": twice and changed,
            "max_length": model.config.max_position_embeddings,
            "module": type(model).__module__,
        },
        out,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
