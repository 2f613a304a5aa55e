"""transformers + torch on the benchmark's shape; run by `benchmark.py --peer=PYTHON`, prints one line of JSON."""

import json
import statistics
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

B, S, PROMPT, NEW = 16, 256, 64, 128


def rate(run, tokens: int) -> float:
    run()
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return tokens / statistics.median(seconds)


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
        max_position_embeddings=512,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)
    ids = torch.randint(0, 8192, (B, S))
    results = {}
    for name, forward in (("eager", model), ("compiled", torch.compile(model))):

        def step(forward=forward):
            with torch.autocast("cpu", torch.bfloat16):
                loss = forward(input_ids=ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        results[f"train, transformers {name}"] = rate(step, B * S)
    model = model.to(torch.bfloat16).eval()
    prompts = ids[:, :PROMPT]

    def decode():
        with torch.no_grad():
            model.generate(prompts, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=True, top_k=0, pad_token_id=0)

    results["decode, transformers"] = rate(decode, B * NEW)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
