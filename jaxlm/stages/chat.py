"""A conversation with a model in the terminal.

    python -m jaxlm chat runs/assistant                                       nothing is kept
    python -m jaxlm chat --config=configs/chat.py --workdir=runs/chats        conversations are kept
    echo "Hi" | python -m jaxlm chat runs/assistant                           a line in, an answer out, nothing else

Time: seconds to load; the first answer to each size of prompt (64, 128, … tokens) compiles. Result, with a workdir:
WORKDIR/chat.jsonl, a line for each conversation, written after every answer:

    {"messages": [{"role", "content"}, …], "model"}           of a base model: {"prompt", "completion", "model"}

The n-th answer of a session is drawn by step n: a retry is another draw, the same seed and inputs give the same chat.
"""

import contextlib
import io
import sys
import time
from typing import Any

import jax

from jaxlm.base import manifest, sharding
from jaxlm.base.errors import UserError
from jaxlm.hub.find import find_model
from jaxlm.hub.language_model import load
from jaxlm.hub.terminal import Chat, piped, typed, waiting
from jaxlm.sample.config import ChatConfig

Config = ChatConfig


def validate(config: ChatConfig, device_count: int) -> None:
    """Raises ConfigError for a mesh that does not divide the devices."""
    config.mesh.sizes(device_count)


def inputs(config: ChatConfig) -> dict[str, str]:
    """What the stage reads → a hash of each."""
    model = find_model(config.model, "model")
    return {str(model): manifest.read(model).hash}


def main(config: ChatConfig) -> dict[str, Any]:
    """Talks until the input ends."""
    began = time.monotonic()
    validate(config, jax.device_count())
    folder = find_model(config.model, "model")
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):  # a letter that the terminal does not know must not end the chat
            stream.reconfigure(errors="replace")
    with waiting(terminal, f"loading {folder}"):
        lm = load(folder, mesh=sharding.make_mesh(config.mesh))
    if lm.config.criteria:
        raise UserError(f"model: {folder} is a reward model, which says nothing; a language model is needed")
    chat = Chat(lm, config, str(folder), terminal)
    chat.greet()
    with contextlib.suppress(EOFError, *([KeyboardInterrupt] if terminal else [])):
        for where, line in typed() if terminal else piped():
            try:
                chat.take(line)
            except (UserError, PermissionError) as error:
                if not terminal:
                    raise UserError(f"{where}: {error}") from error
                chat.note(str(error), "yellow")
    print(end="\n" * terminal)
    return {"seconds": round(time.monotonic() - began, 2), "figure": f"answers: {chat.drawn}"}
