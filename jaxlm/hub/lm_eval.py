"""Any model directory as a model of lm_eval (EleutherAI's evaluation harness): pip install -e '.[lm-eval]'.

    python -m jaxlm.hub.lm_eval run --model jaxlm --model_args path=runs/demo/sft --tasks hellaswag

or in Python

    import lm_eval
    from jaxlm.hub.lm_eval import adapter
    lm_eval.simple_evaluate(model=adapter()(path="runs/demo/sft"), tasks=["hellaswag"])

lm_eval is imported when an adapter is asked for, not before. Contexts that are longer than the model's rows lose their
beginning, as with lm_eval's own models; context_tokens counts the last scored token too, which max_length of lm_eval's
hf does not. Whole texts are cut into windows as lm_eval's own models cut them. BOS stands before a text and is never
scored: lm_eval's hf puts one before that of a tokenizer that adds its own, and scores that (add_bos_token=False there
leaves it out).
"""

import functools
import importlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxlm.base.errors import JaxlmError, UserError
from jaxlm.hub.language_model import SCORE_ROWS, LanguageModel, load
from jaxlm.sample.config import SamplingConfig

# What generate_until's arguments may ask for, beside temperature and top_p; the rest is refused, not passed over.
IGNORED = ("do_sample", "num_beams", "max_length", "use_cache", "pad_token_id")
MOST_TOKENS = 256


def _library(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"lm_eval is not installed: pip install -e '.[lm-eval]' ({error})") from error


class Adapter:
    """What makes a jaxlm model an lm_eval one; `lm` in place of `path` takes one that is loaded."""

    cache_hook: Any
    """lm_eval's."""

    def __init__(self, path: str = "", lm: LanguageModel | None = None, context_tokens: int = 0, **others: Any):
        super().__init__()
        # lm_eval adds these by itself; one device and a batch size of our own are used anyway.
        if unknown := others.keys() - {"batch_size", "max_batch_size", "device", "trust_remote_code"}:
            raise UserError(f"model_args: {', '.join(sorted(unknown))}: not known; path and context_tokens are")
        if lm is None and not path:
            raise UserError("model_args: path is missing; give a model directory or a run's folder")
        self.lm = lm or load(path)
        self.path = path
        self.context = int(context_tokens) or self.lm.context_tokens
        if not self.context:
            raise UserError("model_args: the model does not say on how long rows it was trained: context_tokens=N")

    @property
    def tokenizer_name(self) -> str:
        template = self.lm.chat_template
        return f"jaxlm-{self.lm.tokenizer.hash[:16]}-{template.hash[:16] if template else 'plain'}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's source, which lm_eval keeps with its results."""
        if not chat_template:
            return None
        if self.lm.chat_template is None:
            raise UserError("apply_chat_template: the model has no chat template; it was not trained on chats")
        return self.lm.chat_template.source

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation in JSON behind a mark: the template turns it into ids later, so that what messages say
        can never become special tokens."""
        self.chat_template(True)
        return CHAT + json.dumps([chat_history, add_generation_prompt], ensure_ascii=False)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log p of the continuation, whether it is the greedy one) of each (context, continuation)."""
        rows = [self._row(*request.args) for request in requests]
        found = self._scores(rows)
        return self._kept("loglikelihood", requests, [(float(logprobs.sum()), bool(hit)) for logprobs, hit in found])

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of each whole text, in windows of the context's length."""
        texts = [list(rolling_rows(self._begun(request.args[0]), self.context)) for request in requests]
        scored = iter(self._scores([row for rows in texts for row in rows]))
        found = [float(sum(next(scored)[0].sum() for _ in rows)) for rows in texts]
        return self._kept("loglikelihood_rolling", requests, found)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model says behind each context, up to a stop string."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        texts: dict[int, str] = {}
        for arguments, numbers in groups.items():
            sampling = sampling_of(json.loads(arguments), self.context)
            room = self.context - sampling.max_tokens
            prompts = [list(self._context(requests[number].args[0]))[-room:] for number in numbers]
            fields = vars(sampling) | {"prompt_ids": numbers, "context_tokens": self.context}
            said = self.lm.generate(prompts, **fields)
            texts |= {number: completion.text for number, completion in zip(numbers, said, strict=True)}
        return self._kept("generate_until", requests, [texts[number] for number in range(len(requests))])

    def _kept(self, name: str, requests: Sequence[Any], results: list[Any]) -> list[Any]:
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial(name, request.args, result)
        return results

    def _context(self, context: str) -> Sequence[int]:
        """Ids of a text or of a conversation, with BOS where the tokenizer has one."""
        if not context.startswith(CHAT):
            return self.lm.sampler.encode(context)
        messages, rest, opened = chat_of(context)
        template = self.lm.chat_template
        assert template is not None
        if not opened:  # the last message is the beginning of the answer
            messages, rest = messages[:-1], messages[-1]["content"] + rest
        return [*template.prompt(messages), *self.lm.tokenizer.encode(rest)]

    def _begun(self, text: str) -> list[int]:
        """Ids of a text behind something to predict its first token from: BOS, or EOS where there is no BOS."""
        ids = list(self._context(text))
        return ids if self._context("") else [self.lm.tokenizer.eos_id, *ids]

    def _row(self, context: str, continuation: str) -> tuple[list[int], int]:
        """(ids cut to the context's length, how many at the end are scored)."""
        chat = context.startswith(CHAT)
        if chat:
            before, ids = self._context(context), [*self._context(context), *self.lm.tokenizer.encode(continuation)]
        else:
            before, ids = self._context(context), self._context(context + continuation)
        # Encoded as one text: a token that reaches over the border belongs to the continuation.
        begin = next((at for at, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), len(before))
        if not before:  # no BOS to predict the first token from
            ids, begin = [self.lm.tokenizer.eos_id, *ids], 1
        scored = len(ids) - begin
        if scored > self.context - 1:
            raise UserError(f"a continuation of {scored} tokens exceeds the context of {self.context}")
        return list(ids)[-self.context :], scored

    def _scores(self, rows: Sequence[tuple[list[int], int]]) -> list[tuple[np.ndarray, bool]]:
        """(log-probabilities, all of them the most likely) of the scored tokens at each row's end."""
        order = sorted(range(len(rows)), key=lambda index: len(rows[index][0]))
        found: dict[int, tuple[np.ndarray, bool]] = {}
        for at in range(0, len(order), SCORE_ROWS):
            group = order[at : at + SCORE_ROWS]
            scores = self.lm.token_scores([rows[index][0] for index in group])
            for row, index in enumerate(group):
                ids, scored = rows[index]
                part = slice(len(ids) - scored, len(ids))
                logprobs = np.asarray(scores.logprobs[row, part], np.float64)
                found[index] = logprobs, bool(np.asarray(scores.correct[row, part]).all())
        return [found[index] for index in range(len(rows))]


@functools.cache
def adapter() -> Any:
    """The class, a subclass of lm_eval's LM: adapter()(path="runs/demo/sft", context_tokens=0)."""
    return type("JaxLM", (Adapter, _library("lm_eval.api.model").LM), {})


# Begins a conversation: a private character, which no text has.
CHAT = "\ue0a0"


def chat_of(context: str) -> tuple[list[dict[str, str]], str, bool]:
    """(messages, what lm_eval put behind the conversation, whether the assistant's turn is opened)."""
    (messages, opened), end = json.JSONDecoder().raw_decode(context, len(CHAT))
    return messages, context[end:], opened


def rolling_rows(ids: Sequence[int], context: int) -> Iterator[tuple[list[int], int]]:
    """(at most `context` ids, how many at their end are scored), so that all but the first are scored once: lm_eval's
    windows with one token of context, and as much as there is room for in the last one.

    >>> list(rolling_rows([0, 1, 2, 3, 4, 5, 6], 4))
    [([0, 1, 2, 3], 3), ([3, 4, 5, 6], 3)]
    >>> list(rolling_rows([0, 1, 2, 3, 4], 4))
    [([0, 1, 2, 3], 3), ([1, 2, 3, 4], 1)]
    """
    done = 1
    while done < len(ids):
        end = min(done + context - 1, len(ids))
        yield list(ids[max(0, end - context) : end]), end - done
        done = end


def sampling_of(arguments: Mapping[str, Any], context: int) -> SamplingConfig:
    """lm_eval's generation arguments as ours; greedy unless do_sample says otherwise. Raises UserError for others."""
    given = dict(arguments)
    until = given.pop("until", [])
    tokens = next(
        (int(given.pop(name)) for name in ("max_gen_toks", "max_new_tokens", "max_tokens") if name in given), 0
    )
    drawn = bool(given.get("do_sample", given.get("temperature", 0)))
    temperature, top_p = float(given.pop("temperature", 1.0)), float(given.pop("top_p", 1.0))
    if unknown := given.keys() - {*IGNORED}:
        raise UserError(f"gen_kwargs: {', '.join(sorted(unknown))}: not known; until, max_gen_toks, do_sample are")
    if given.get("num_beams", 1) != 1:
        raise UserError(f"gen_kwargs: num_beams is {given['num_beams']}; beams are not searched: leave it out")
    return SamplingConfig(
        max_tokens=min(tokens or MOST_TOKENS, context - 1),
        temperature=temperature if drawn else 0.0,
        top_p=top_p if drawn else 1.0,
        stop=tuple(text for text in ([until] if isinstance(until, str) else until) if text),
    )


def register() -> None:
    """Makes the model known to lm_eval as "jaxlm"."""
    registry = _library("lm_eval.api.registry")
    registry.register_model("jaxlm")(adapter())


def main() -> int:
    """lm_eval's own command line, with this model in it."""
    try:
        register()
        return _library("lm_eval.__main__").cli_evaluate() or 0
    except JaxlmError as error:
        print(f"jaxlm: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
