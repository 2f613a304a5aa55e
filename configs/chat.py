"""A conversation in the terminal with the demo's policy.

    python -m jaxlm chat --config=configs/chat.py --workdir=runs/talk       # after make demo
    python -m jaxlm chat runs/demo/ppo                                      # the same, and nothing is kept

Hardware: any. The first answer compiles for some seconds. WORKDIR/chat.jsonl keeps the conversations.
"""

from jaxlm.sample.config import ChatConfig


def get_config() -> ChatConfig:
    return ChatConfig(model="runs/demo/ppo")
