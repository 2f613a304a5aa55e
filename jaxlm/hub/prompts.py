"""What a model is asked by the stage sample: prompts of its config, or of a file."""

import json
from typing import Any

from etils import epath

from jaxlm.base.errors import UserError
from jaxlm.data import chats
from jaxlm.sample.config import SampleConfig
from jaxlm.text.clean import Reason


def conversation(record: dict[str, Any]) -> chats.Messages:
    """What is to be answered in a prompt's (or a completion's) record."""
    return record.get("messages") or [{"role": "user", "content": record["prompt"]}]


def read_prompts(config: SampleConfig) -> list[dict[str, Any]]:
    """One object a prompt, with "prompt_id" and "prompt"; raises UserError naming file and line."""
    if not config.prompts_file:
        return [{"prompt_id": number, "prompt": prompt} for number, prompt in enumerate(config.prompts)]
    path = epath.Path(config.prompts_file)
    prompts = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number}: is not valid JSON: {error}") from None
        if config.chat and isinstance(record, dict) and "messages" in record:
            messages = chats.messages_of({"messages": record["messages"]})
            if isinstance(messages, Reason):
                raise UserError(f"{path}:{number}: {messages.name.replace('_', ' ')}")
            record["prompt"] = str(messages[-1].get("content"))
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
            raise UserError(f'{path}:{number}: has no text under "prompt"; {{"prompt": "..."}} is needed')
        name = record.setdefault("prompt_id", len(prompts))
        if not isinstance(name, int) or isinstance(name, bool) or not 0 <= name < 2**32:
            raise UserError(f"{path}:{number}: prompt_id {name!r} is not a whole number from 0 to 2**32 - 1")
        prompts.append({"prompt_id": name} | record)
    if not prompts:
        raise UserError(f"prompts_file: {path} holds no prompt")
    return prompts
