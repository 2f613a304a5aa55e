"""Does a model recite its training data? The first n tokens of a row are given; do the next m come, all of them?

    {"train": {"value", "interval", "n"}, "heldout": {...}, "difference": {...}, "prompt_tokens": 32, "tokens": 32}

(arXiv:2202.07646 calls this extractable with n tokens of context.) What also comes for rows that were never trained on
is no memory but predictable text, which is why both stand side by side, and their difference.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxlm.base.errors import UserError
from jaxlm.data import rows
from jaxlm.data.loader import RowSource
from jaxlm.evaluate import intervals
from jaxlm.evaluate.config import MemorisationConfig
from jaxlm.evaluate.subject import Records, Subject
from jaxlm.sample.config import SamplingConfig
from jaxlm.text.config import Split


def measure(config: MemorisationConfig, subject: Subject, records: Records) -> dict[str, Any]:
    """The figures; prompts and continuations go to examples/memorisation.jsonl."""
    sampling = SamplingConfig(temperature=0.0, max_tokens=config.tokens, stop_at_eos=False)
    decode = subject.tokenizer.decode
    found: dict[str, Any] = {}
    lines = []
    splits: tuple[Split, ...] = ("train", "heldout")
    for split in splits:
        sequences = read(config, split, subject)
        n = config.prompt_tokens
        said = subject.generate([ids[:n].tolist() for ids in sequences], sampling)
        same = [exact(completion.ids, ids[n:]) for completion, ids in zip(said, sequences, strict=True)]
        found[split] = intervals.share(same)
        for completion, ids, whole in zip(said, sequences, same, strict=True):
            texts = {"prompt": decode(ids[:n].tolist()), "text": decode(ids[n:].tolist()), "said": completion.text}
            lines.append({"split": split, **texts, "exact": whole})
    records.write("memorisation", lines)
    found["difference"] = intervals.difference(found["train"], found["heldout"])
    return found | {"prompt_tokens": config.prompt_tokens, "tokens": config.tokens}


def exact(said: Sequence[int], text: np.ndarray) -> bool:
    """Whether all of the text was said, token by token."""
    return list(said) == text.tolist()


def read(config: MemorisationConfig, split: Split, subject: Subject) -> list[np.ndarray]:
    """n + m ids of `examples` rows, from the beginning of the first segment that is long enough."""
    source = RowSource(config.rows, split)
    if source.tokenizer_hash != subject.tokenizer.hash:
        raise UserError(f"memorisation.rows: {config.rows} was packed with another tokenizer than the model's")
    names = sorted(name for name in source.manifest.files if name.startswith(f"{split}/"))
    reader = rows.RowReader([source.folder / name for name in names])
    size = config.prompt_tokens + config.tokens
    found = []
    for index in np.unique(np.linspace(0, len(reader) - 1, min(len(reader), 4 * config.examples)).astype(int)):
        long = [piece.ids[:size] for piece in rows.decode(reader[int(index)]) if len(piece.ids) >= size]
        found += long[:1]
    if not found:
        raise UserError(f"memorisation.prompt_tokens: no {split} segment has {size} tokens; lower it, or tokens")
    return [found[at] for at in np.unique(np.linspace(0, len(found) - 1, min(len(found), config.examples)).astype(int))]
