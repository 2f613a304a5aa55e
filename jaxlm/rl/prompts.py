"""The prompts of reinforcement learning: read once, then a step's prompts are a function of the step."""

import bisect
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import grain
from etils import epath

from jaxlm.base import files
from jaxlm.base.errors import ConfigError, Refused, UserError
from jaxlm.base.logging import logger
from jaxlm.data import chats
from jaxlm.data.config import ChatSource
from jaxlm.rl.config import RLConfig
from jaxlm.text import readers, tally
from jaxlm.text.clean import Reason
from jaxlm.text.config import Split
from jaxlm.tokenizer.chat import ChatTemplate
from jaxlm.train.processes import from_first

MAX_RECORD_BYTES = 2**24
MAX_BAD_SHARE = 0.01


class Prompt(NamedTuple):
    number: int
    """Its place among the prompts of its split: names its random numbers"""
    text: str
    """The last message, for verifiers and logs"""
    ids: tuple[int, ...]
    record: dict[str, Any]
    where: str = ""
    """file:line"""


def read(
    sources: Sequence[ChatSource],
    split: Split,
    template: ChatTemplate | None,
    encode: Callable[[str], list[int]],
    max_tokens: int,
    workdir: str = "",
) -> list[Prompt]:
    """The prompts of a split of the sources, in order; without a chat template they are plain texts.

    With a `workdir` they are counted in WORKDIR/data-SPLIT.json.

    An assistant's last message is left out: it is what the policy is to write. Raises Refused where too many records
    are bad, UserError where none is left.
    """
    prompts: list[Prompt] = []
    tallies: dict[str, tally.Tally] = {}
    for source in sources:
        if split not in source.splits:
            continue
        counted = tallies[source.name] = tally.Tally()
        for record in readers.read_split(source, split, MAX_RECORD_BYTES):
            made = _prompt(record.value, len(prompts), template, encode)
            if isinstance(made, Prompt) and len(made.ids) > max_tokens:
                made = Reason("longer_than_max_prompt_tokens")
            if isinstance(made, Prompt):
                prompts.append(made._replace(where=record.where))
            counted.count(record.where, made if isinstance(made, Reason) else None, record.raw or str(record.value))
            if isinstance(made, Reason) and made.bad:
                logger.warning("%s: %s %s", record.where, made.name, made.detail)
    for name, counted in tallies.items():
        if not counted.read:
            raise UserError(f"sources.{name}: holds no record at all")
        if counted.bad > MAX_BAD_SHARE * counted.read:
            raise Refused(f"sources.{name}: {counted.bad} of {counted.read} records are bad: {dict(counted.dropped)}")
    report = tally.report(tallies)
    if workdir:
        from_first(lambda: files.write_json(epath.Path(workdir) / f"data-{split}.json", report))
    dropped = report["dropped"]
    if not prompts:
        raise UserError(f"sources: no prompt is left; dropped {dropped}")
    logger.info("%d prompts%s", len(prompts), f", dropped {dropped}" if dropped else "")
    return prompts


def read_splits(
    config: RLConfig, template: ChatTemplate | None, encode: Callable[[str], list[int]]
) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts to train on, and the held-out ones, as many of these as the config wants."""
    limits = config.max_prompt_tokens, config.workdir
    asked = read(config.sources, "train", template, encode, *limits)
    heldout: list[Prompt] = []
    if any("heldout" in source.splits for source in config.sources):
        heldout = read(config.sources, "heldout", template, encode, *limits)[: config.heldout_prompts or None]
    if both := len({prompt.ids for prompt in asked} & {prompt.ids for prompt in heldout}):
        logger.warning("%d of %d held-out prompts are trained on too", both, len(heldout))
    return asked, heldout


def _prompt(
    value: dict[str, Any] | Reason, number: int, template: ChatTemplate | None, encode: Callable[[str], list[int]]
) -> Prompt | Reason:
    if isinstance(value, Reason):
        return value
    given = value.get("messages", value.get("prompt"))
    if isinstance(given, str) and template is None:
        return Prompt(number, given, tuple(encode(given)), value)
    messages = chats.messages_of(
        {"messages": [{"role": "user", "content": given}] if isinstance(given, str) else given}
    )
    if isinstance(messages, Reason):
        return messages
    if template is None:
        return Reason("conversation_for_a_model_without_chat_template", bad=True)
    if messages[-1].get("role") == "assistant":
        messages = messages[:-1]
    try:
        return Prompt(number, str(messages[-1].get("content")), tuple(template.prompt(messages)), value)
    except (UserError, IndexError) as error:
        return Reason("refused_by_the_chat_template", bad=True, detail=str(error))


class Order:
    """Which prompts a step takes: all of them once an epoch, each epoch in an order of its own.

    >>> Order(prompts, 4, seed=0).at(7)                                # the prompts of step 7
    """

    def __init__(self, prompts: Sequence[Prompt], count: int, seed: int, exclude: Sequence[str] = ()):
        """`exclude`: numbers of prompts in whose place the next one stands, for a second time."""
        if count > len(prompts):
            few = "prompts: a rollout takes %d, and the sources have %d: some are asked several times in each"
            logger.warning(few, count, len(prompts))
        if unknown := {*exclude} - {str(prompt.number) for prompt in prompts}:
            name = min(unknown)
            raise ConfigError("exclude", f"got {name!r}; a prompt's number, 0 to {len(prompts) - 1}, is needed")
        kept = [number for number in range(len(prompts)) if str(number) not in exclude]
        if not kept:
            raise ConfigError("exclude", "names every prompt; none is left")
        stand_in = lambda number: kept[bisect.bisect_left(kept, number) % len(kept)]
        self.prompts, self.count = [prompts[stand_in(number)] for number in range(len(prompts))], count
        # As data/loader.py orders rows.
        shuffled = lambda name: grain.MapDataset.range(len(prompts)).shuffle(seed=zlib.crc32(f"{seed}/{name}".encode()))
        self._order, self._fresh = shuffled("prompts").repeat(), shuffled("fresh prompts").repeat()

    def at(self, step: int) -> list[Prompt]:
        return [self.prompts[cast(int, self._order[step * self.count + i])] for i in range(self.count)]

    def fresh(self, step: int, count: int) -> list[Prompt]:
        """`count` prompts that the step does not take, or as many as there are; in an order of their own."""
        seen = {prompt.number for prompt in self.at(step)} if count else set()
        found: list[Prompt] = []
        for place in range(step * count, step * count + 2 * len(self.prompts)):  # holds a whole epoch
            if len(found) == count:
                break
            prompt = self.prompts[cast(int, self._fresh[place])]
            if prompt.number not in seen:
                seen.add(prompt.number)
                found.append(prompt)
        return found

    def from_step(self, step: int) -> Iterator[tuple[int, list[Prompt]]]:
        while True:
            yield step, self.at(step)
            step += 1
