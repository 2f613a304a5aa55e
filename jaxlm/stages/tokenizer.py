"""A tokenizer: trained on the documents, or an existing one, measured on them.

    python -m jaxlm run --config=configs/demo.py --workdir=runs/demo --config.only=tokenizer

Time: for 8192 tokens and 4 MB of text on 2 cores, BPE takes 3 seconds and unigram 13. Result: WORKDIR/tokenizer.model
(or byte_tokenizer.json) and manifest.json, whose facts hold the bytes of UTF-8 that a token stands for, on both splits.
"""

import time
from typing import Any

from etils import epath

from jaxlm.base import config as configs
from jaxlm.base import files, logging, manifest
from jaxlm.base.errors import Refused
from jaxlm.evaluate.tokenization import measure, sample
from jaxlm.text import documents
from jaxlm.tokenizer.byte import ByteTokenizer
from jaxlm.tokenizer.config import BASIC_TOKENS, TokenizerConfig
from jaxlm.tokenizer.sentencepiece import SentencePieceTokenizer
from jaxlm.tokenizer.tokenizer import KINDS, Tokenizer, load, save
from jaxlm.tokenizer.train import train

Config = TokenizerConfig


def validate(config: TokenizerConfig, device_count: int) -> None:
    """Raises UserError for an existing tokenizer that is not there."""
    if config.kind == "existing":
        files.expand(config.path, "path")


def inputs(config: TokenizerConfig) -> dict[str, str]:
    """What the stage reads → a hash of each."""
    read_from = {config.documents: manifest.read(config.documents, "documents", "documents").hash}
    return read_from | ({config.path: load(config.path).hash} if config.kind == "existing" else {})


def main(config: TokenizerConfig) -> dict[str, Any]:
    """Makes WORKDIR's tokenizer. Raises Refused for a trained one that does not give the documents back exactly."""
    began = time.monotonic()
    validate(config, device_count=0)
    workdir = epath.Path(config.workdir)
    made_from = manifest.read(config.documents, "documents", "documents")
    manifest.verify(config.documents, made_from)
    read_from = inputs(config)

    samples = {
        split: sample(
            documents.read(config.documents, split), made_from.facts[split]["bytes"], config.sample_bytes, config.seed
        )
        for split in ("train", "heldout")
    }
    tokenizer: Tokenizer
    if config.kind == "sentencepiece":
        logging.logger.info("tokenizer: training %s on %d documents", config.algorithm, len(samples["train"]))
        tokenizer = SentencePieceTokenizer(train(samples["train"], config))
    elif config.kind == "byte":
        tokenizer = ByteTokenizer([*BASIC_TOKENS[:3], *config.added_tokens])
    else:
        tokenizer = load(config.path)

    measured = {split: measure(tokenizer, texts) for split, texts in samples.items() if texts}
    lossy = sum(m["documents_changed"] for m in measured.values())
    if lossy and config.kind != "existing":
        raise Refused(f"tokenizer: {lossy} documents do not decode to what was encoded; this is a defect of jaxlm")
    if lossy:
        logging.logger.warning("tokenizer: %s rewrites text: %d documents come back changed", config.path, lossy)
    seconds = time.monotonic() - began
    split = "heldout" if "heldout" in measured else "train"
    tokens = sum(m["tokens"] for m in measured.values())
    summary = {
        "seconds": round(seconds, 2),
        "tokens_per_second": round(tokens / seconds, 1),
        "figure": f"{tokenizer.vocab_size} tokens, {measured[split]['bytes_per_token']:.2f} {split} bytes a token",
    }
    facts = {
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_hash": tokenizer.hash,
        "special_ids": tokenizer.special_ids,
        "measured": measured,
        "summary": summary,
    }
    files.clear(workdir, ("manifest.json", *KINDS))
    contents = [save(tokenizer, workdir)]
    manifest.write(
        workdir, "tokenizer", contents=contents, inputs=read_from, config=configs.identity(config), facts=facts
    )
    return summary
