"""Writes tests/tokenizer/fixtures/renderings.json: chat templates, conversations, what transformers renders of them.

    python tests/tokenizer/make_chat_fixtures.py tests/tokenizer/fixtures/renderings.json      # needs transformers

The templates are written for this, after what those of released models do: headers by role, a default system message,
trimmed contents, tools as JSON in two forms, tool calls and answers, thoughts that older turns lose, loop controls,
namespaces, macros, generation blocks.
"""

import json
import sys
from pathlib import Path
from typing import Any

TEMPLATES = {
    "headers": """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% generation %}{{ message['content'] }}{% endgeneration %}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}""",
    "trimmed": """\
{{ bos_token }}{% set ns = namespace(system='You help.') %}
{% for message in messages %}
    {% if message.role == 'system' %}
        {% set ns.system = message.content %}
        {% continue %}
    {% endif %}
    {% if loop.first or (loop.index0 == 1 and messages[0].role == 'system') %}
[{{ ns.system | trim }}]
    {% endif %}
{{- '(' ~ message.role | upper ~ ') ' ~ message.content | trim ~ (eos_token if message.role == 'assistant' else '') }}
{% endfor %}
{{- '(ASSISTANT)' if add_generation_prompt -}}""",
    "tools": """\
{% macro call(each) %}<call>{{ {'name': each.function.name, 'arguments': each.function.arguments} | tojson }}</call>
{%- endmacro %}
{% if tools is not none and tools %}<|im_start|>system
{% for tool in tools %}
{{ tool | tojson(indent=2) }}
{% endfor %}
{{ tools | map(attribute='function.name') | join(', ') }}<|im_end|>
{% endif %}
{% set last = messages | selectattr('role', 'equalto', 'user') | list | length %}
{% set seen = namespace(users=0) %}
{% for message in messages %}
{%- if message.role == 'user' %}{% set seen.users = seen.users + 1 %}{% endif %}
<|im_start|>{{ message.role }}
{% if message.reasoning_content is defined and seen.users == last %}<think>{{ message.reasoning_content }}</think>
{% endif %}
{{- message.content.split('</think>')[-1].lstrip('\\n') }}
{%- for each in message.tool_calls or [] %}{{ call(each) }}{% if not loop.last %};{% endif %}{% endfor %}
<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{{ '<think>\\n\\n</think>' if enable_thinking is defined and not enable_thinking }}{% endif %}""",
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a <place> & its neighbours — „genau“.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"place": "Zürich", "days": [1, 2.5, None]}}}
ASKED = [{"role": "user", "content": "  What is 2 < 3 & 'so'?\n"}]
ANSWERED = [*ASKED, {"role": "assistant", "content": " True. "}]
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "asked": ASKED,
    "answered": ANSWERED,
    "system": [{"role": "system", "content": "Be brief. "}, *ANSWERED, {"role": "user", "content": "Да?"}],
    "thought": [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Yes.", "reasoning": "easy"},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "<think>hm</think>\n\nNo.", "thinking": "hard"},
    ],
    "called": [
        *ASKED,
        {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": '{"degrees": 3}'},
        {"role": "assistant", "content": "Three."},
    ],
}
SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"add_generation_prompt": True},
    {"continue_final_message": True},
    {"tools": [WEATHER], "add_generation_prompt": True, "enable_thinking": False},
)


def main() -> None:
    import transformers
    from transformers.utils.chat_template_utils import render_jinja_template

    cases = []
    for template, source in TEMPLATES.items():
        for conversation, messages in CONVERSATIONS.items():
            for settings in SETTINGS:
                tokens = {"bos_token": "<s>", "eos_token": "</s>"}
                try:
                    (text,), _ = render_jinja_template([messages], chat_template=source, **settings, **tokens)
                except ValueError:  # a content to go on with that the template does not write
                    text = None
                cases.append({"template": template, "conversation": conversation, "settings": settings, "text": text})
    made = {
        "transformers": transformers.__version__,
        "templates": TEMPLATES,
        "conversations": CONVERSATIONS,
        "cases": cases,
    }
    path = Path(sys.argv[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n")
    print(f"{path}: {len(cases)} renderings")


if __name__ == "__main__":
    main()
