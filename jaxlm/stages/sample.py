"""Sampling: a model and prompts → completions.

    python -m jaxlm run --config=configs/demo.py --workdir=runs/demo --config.only=sample

Time: one compilation for each size of prompt, then a forward pass a token. Result: WORKDIR/completions.jsonl, a line
for each prompt and sample,

    {"prompt_id", "prompt", "sample", "text", "ids", "logprobs", "stop_reason"}

with what else stood in the prompt's line of `prompts_file`. A line's "prompt_id" there (default: its number, from 0)
names its random numbers. With `chat`, a line may have "messages" in place of "prompt". The stage select takes the
best of several samples.
"""

import json
import time
from typing import Any

import jax
from etils import epath

from jaxlm.base import config as configs
from jaxlm.base import files, logging, manifest, sharding
from jaxlm.base.errors import ConfigError, UserError
from jaxlm.hub.find import find_model, inputs_of
from jaxlm.hub.language_model import load
from jaxlm.hub.prompts import conversation, read_prompts
from jaxlm.sample.config import SampleConfig

Config = SampleConfig


def validate(config: SampleConfig, device_count: int) -> None:
    """Raises ConfigError for a mesh that does not divide the devices."""
    config.mesh.sizes(device_count)


def inputs(config: SampleConfig) -> dict[str, str]:
    """What the stage reads → a hash of each."""
    read = inputs_of(config.model, "", ())
    if config.prompts_file:
        if not epath.Path(config.prompts_file).exists():
            raise UserError(f"prompts_file: no such file: {config.prompts_file}")
        read[config.prompts_file] = files.sha256(config.prompts_file)
    return read


def main(config: SampleConfig) -> dict[str, Any]:
    """Writes WORKDIR/completions.jsonl, prints the first completions."""
    began = time.monotonic()
    validate(config, jax.device_count())
    workdir = epath.Path(config.workdir)
    files.clear(workdir, ("manifest.json", "completions.jsonl"))
    read_from = inputs(config)
    prompts = read_prompts(config)
    lm = load(find_model(config.model, "model"), mesh=sharding.make_mesh(config.mesh))
    sampling = config.sampling
    if config.chat and lm.chat_template is None:
        raise ConfigError("chat", f"{config.model} has no chat template; it was not trained on chats")
    asked = [conversation(prompt) if config.chat else prompt["prompt"] for prompt in prompts]
    encoded = [lm.encode(prompt, f"prompts[{number}]") for number, prompt in enumerate(asked)]
    group = max(1, sampling.batch_rows // sampling.samples)
    completions = []
    with logging.progress("sample", len(prompts)) as progress, jax.set_mesh(lm.mesh):
        for at in range(0, len(prompts), group):
            names = [prompt["prompt_id"] for prompt in prompts[at : at + group]]
            completions += lm.sampler.generate(lm.params, encoded[at : at + group], sampling, prompt_ids=names)
            progress.advance(len(names))

    lines = []
    for index, completion in enumerate(completions):
        number, sample = divmod(index, sampling.samples)
        record = prompts[number] | {"sample": sample} | vars(completion)
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
        if index < 10:
            logging.console.print(record["prompt"], style="bold", end="", markup=False, emoji=False)
            logging.console.print(f"{completion.text} [{completion.stop_reason}]\n", markup=False, emoji=False)
    files.write_bytes(workdir / "completions.jsonl", "".join(lines).encode())
    seconds = time.monotonic() - began
    tokens = sum(len(completion.ids) for completion in completions)
    figure = f"{len(completions)} completions, {tokens} tokens"
    summary = {"seconds": round(seconds, 2), "tokens_per_second": round(tokens / seconds, 1), "figure": figure}
    manifest.write(
        workdir,
        "samples",
        contents=["completions.jsonl"],
        inputs=read_from,
        config=configs.identity(config),
        facts={
            "completions": len(completions),
            "tokens": tokens,
            "samples": sampling.samples,
            "tokenizer_hash": lm.tokenizer.hash,
            "chat_template_hash": lm.chat_template.hash if config.chat and lm.chat_template else "",
            "summary": summary,
        },
    )
    return summary
