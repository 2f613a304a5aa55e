"""A made-up model for tests of metrics: each token costs a fixed number of nats, each prompt has a written answer."""

import dataclasses
from collections import defaultdict
from collections.abc import Callable

import numpy as np

from jaxlm.evaluate.likelihood import DocumentSums
from jaxlm.evaluate.subject import Subject
from jaxlm.sample.sampler import Completion
from jaxlm.tokenizer import chat
from jaxlm.tokenizer.byte import ByteTokenizer

TOKENIZER = ByteTokenizer(("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"))


def subject(
    cost: Callable[[str], float] = lambda character: 1.0, answer: Callable[[str], str] = str, **fields
) -> Subject:
    """`cost`: nats of a byte, as a character of Latin-1; `answer`: prompt → text, which ends with EOS."""
    sizes = TOKENIZER.token_bytes()

    def measure(rows, row_length):
        sums = defaultdict(DocumentSums)
        for row in rows:
            assert sum(len(piece.ids) for piece in row) <= row_length
            for piece in row:
                for id in piece.ids[1:][piece.targets[1:]]:
                    document = sums[piece.document]
                    document.nats += cost(TOKENIZER.piece(int(id))) if sizes[id] else 100.0
                    document.tokens += 1
                    document.bytes += int(sizes[id])
        return dict(sums)

    def generate(prompts, sampling):
        said = []
        for prompt in prompts:
            text = answer(TOKENIZER.decode(prompt))
            ids = TOKENIZER.encode(text)[: sampling.max_tokens]
            ended = len(ids) < sampling.max_tokens
            for stop in sampling.stop:
                text = text.partition(stop)[0]
            ids = (*ids, TOKENIZER.eos_id) if ended else tuple(ids)
            said.append(Completion(text, ids, (0.0,) * len(ids), "eos" if ended else "length"))
        return said

    made = Subject(
        name="runs/x", tokenizer=TOKENIZER, template=None, row_length=256, measure=measure, generate=generate
    )
    return dataclasses.replace(made, **fields)


def chatml() -> chat.ChatTemplate:
    return chat.load("chatml", TOKENIZER)


def target_text(piece) -> str:
    """What the model is measured on."""
    return TOKENIZER.decode(np.asarray(piece.ids)[piece.targets].tolist())
