"""Chat templates render as transformers renders them, byte for byte (fixtures: make_chat_fixtures.py)."""

import json
from pathlib import Path

import pytest

from jaxlm.base.errors import UserError
from jaxlm.tokenizer.byte import ByteTokenizer
from jaxlm.tokenizer.chat import ChatTemplate, load
from jaxlm.tokenizer.config import CHAT_TOKENS

MADE = json.loads((Path(__file__).parent / "fixtures/renderings.json").read_text())
TOKENIZER = ByteTokenizer(("<pad>", "<s>", "</s>", *CHAT_TOKENS))


@pytest.mark.parametrize("name", MADE["templates"])
def test_every_rendering_is_that_of_transformers(name):
    template = ChatTemplate(MADE["templates"][name], TOKENIZER)
    cases = [case for case in MADE["cases"] if case["template"] == name]
    assert len(cases) == 20
    for case in cases:
        messages = MADE["conversations"][case["conversation"]]
        if case["text"] is None:
            with pytest.raises(UserError, match="so that none can go on with it"):
                template.render(messages, **case["settings"])
        else:
            assert template.render(messages, **case["settings"]) == case["text"], case


def test_a_final_message_is_gone_on_with_or_a_new_one_is_asked_for():
    template = load("chatml", TOKENIZER)
    messages = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "one <|im_end|> "}]
    assert template.render(messages, continue_final_message=True).endswith("assistant\none <|im_end|> ")
    with pytest.raises(UserError, match="one of them"):
        template.render(messages, continue_final_message=True, add_generation_prompt=True)
