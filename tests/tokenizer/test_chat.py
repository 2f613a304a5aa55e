import datetime
import functools
import hashlib
import io
import itertools
import json

import jinja2
import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxlm.base.errors import UserError
from jaxlm.tokenizer import chat
from jaxlm.tokenizer.byte import ByteTokenizer
from jaxlm.tokenizer.chat import ChatTemplate, load
from jaxlm.tokenizer.config import CHAT_TOKENS, TokenizerConfig
from jaxlm.tokenizer.sentencepiece import SentencePieceTokenizer
from jaxlm.tokenizer.train import train

HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
NAMES = ("<pad>", "<s>", "</s>", *CHAT_TOKENS, *HEADERS)
SHIPPED = ("chatml", "llama2", "llama3")


@functools.cache
def byte() -> ByteTokenizer:
    return ByteTokenizer(NAMES)


@functools.cache
def pieces() -> SentencePieceTokenizer:
    lines = [f"user assistant system\nHello {word}, what is the day?\n" for word in "дай чай да нет one two".split()]
    config = TokenizerConfig(
        documents="unused", vocab_size=330, reserved_tokens=0, special_tokens=(*CHAT_TOKENS, *HEADERS)
    )
    return SentencePieceTokenizer(train(lines * 20, config))


def without_bos() -> ByteTokenizer:
    tokenizer = ByteTokenizer(NAMES)
    tokenizer.bos_id = None
    return tokenizer


def conversation(*contents, system=None):
    """user, assistant, user, ... in turns"""
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def picture(encoded, tokenizer):
    """A line of pieces with the mask below it and the messages below that."""
    shown = [tokenizer.piece(id).replace("<0x0A>", "↵").replace(" ", "␣") for id in encoded.ids]
    rows = shown, encoded.targets.astype(int), encoded.messages
    lines = (" ".join(f"{value!s:>{len(piece)}}" for piece, value in zip(shown, row, strict=True)) for row in rows)
    return "\n".join(lines)


def runs(encoded, tokenizer):
    """(mask, message, text) of neighbours that are alike, whatever their tokens are."""
    found = []
    columns = zip(encoded.targets.tolist(), encoded.messages.tolist(), encoded.ids.tolist(), strict=True)
    for (target, message), group in itertools.groupby(columns, lambda column: column[:2]):
        found.append((int(target), message, spelled([id for *_, id in group], tokenizer)))
    return found


def spelled(ids, tokenizer):
    """The text of ids with the names of special tokens in it."""
    special, text = set(tokenizer.special_ids.values()), ""
    while ids:
        count = next((i for i, id in enumerate(ids) if id in special), len(ids))
        text += tokenizer.decode(ids[:count]) + "".join(map(tokenizer.piece, ids[count : count + 1]))
        ids = ids[count + 1 :]
    return text


def test_chatml_as_a_picture():
    encoded = load("chatml", byte()).encode(conversation("Hi", "A ", "?", ""))
    first = """
<s> <|im_start|> u s e r ↵ H i <|im_end|> ↵ <|im_start|> a s s i s t a n t ↵ A ␣ <|im_end|> ↵
  0            0 0 0 0 0 0 0 0          0 0            0 0 0 0 0 0 0 0 0 0 0 1 1          1 0
 -1            0 0 0 0 0 0 0 0          0 0            1 1 1 1 1 1 1 1 1 1 1 1 1          1 1"""
    then = """
 <|im_start|> u s e r ↵ ? <|im_end|> ↵ <|im_start|> a s s i s t a n t ↵ <|im_end|> ↵
            0 0 0 0 0 0 0          0 0            0 0 0 0 0 0 0 0 0 0 0          1 0
            2 2 2 2 2 2 2          2 2            3 3 3 3 3 3 3 3 3 3 3          3 3"""
    both = zip(first.splitlines()[1:], then.splitlines()[1:], strict=True)
    assert picture(encoded, byte()) == "\n".join(a + b for a, b in both)
    assert [array.dtype.name for array in encoded] == ["int32", "bool", "int32"]


@pytest.mark.parametrize("tokenizer", [byte(), pieces()], ids=["byte", "sentencepiece"])
def test_the_shipped_templates(tokenizer):
    messages = conversation(" Да?", "да  ", "<b>&", "", system="Be\nbrief")
    assert runs(load("chatml", tokenizer).encode(messages), tokenizer) == [
        (0, -1, "<s>"),
        (0, 0, "<|im_start|>system\nBe\nbrief<|im_end|>\n"),
        (0, 1, "<|im_start|>user\n Да?<|im_end|>\n"),
        (0, 2, "<|im_start|>assistant\n"),
        (1, 2, "да  <|im_end|>"),
        (0, 2, "\n"),
        (0, 3, "<|im_start|>user\n<b>&<|im_end|>\n"),
        (0, 4, "<|im_start|>assistant\n"),
        (1, 4, "<|im_end|>"),
        (0, 4, "\n"),
    ]
    llama3 = "<|start_header_id|>{}<|end_header_id|>\n\n"
    assert runs(load("llama3", tokenizer).encode(messages), tokenizer) == [
        (0, -1, "<s>"),
        (0, 0, llama3.format("system") + "Be\nbrief<|eot_id|>"),
        (0, 1, llama3.format("user") + " Да?<|eot_id|>"),
        (0, 2, llama3.format("assistant")),
        (1, 2, "да  <|eot_id|>"),
        (0, 3, llama3.format("user") + "<b>&<|eot_id|>"),
        (0, 4, llama3.format("assistant")),
        (1, 4, "<|eot_id|>"),
    ]
    # System and user are one text without a special token between them, so a token may begin in the one and end in the
    # other, as "\n " does here.
    encoded = load("llama2", tokenizer).encode(messages)
    assert runs(encoded, tokenizer)[3:] == [(1, 2, "да  </s>"), (0, 3, "[INST] <b>& [/INST] "), (1, 4, "</s>")]
    bos, system, user = (text for *_, text in runs(encoded, tokenizer)[:3])
    assert bos + system + user == "<s>[INST] <<SYS>>\nBe\nbrief\n<</SYS>>\n\n Да? [/INST] "
    if tokenizer is byte():
        assert system == "[INST] <<SYS>>\nBe\nbrief\n<</SYS>>\n\n"


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_templates_write_the_beginning_of_a_conversation_as_they_do_in_the_whole(name):
    template = load(name, byte())
    messages = conversation("a", "b", "", "d ", "e", "f", system="s")
    for i, message in enumerate(messages):
        prompt, whole = template.prompt(messages[: i or 1]), template.encode(messages)
        if message["role"] == "assistant":
            assert template.render(messages).startswith(template.render(messages[:i], add_generation_prompt=True))
            assert prompt == whole.ids[: len(prompt)].tolist()
            assert whole.targets[len(prompt)]
            assert not whole.targets[len(prompt) - 1]
        assert template.render(messages).startswith(template.render(messages[: i + 1]))
    assert template.stop_ids == (
        byte().special_ids[{"chatml": "<|im_end|>", "llama2": "</s>"}.get(name, "<|eot_id|>")],
    )
    assert not template.reads_clock
    assert template.hash == hashlib.sha256(template.source.encode()).hexdigest()


NASTY = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufdd0\ufdd1\ufdd2")),
    st.lists(st.sampled_from([*NAMES, "<|im_", "end|>", "<", "|>", " ", "\n", "[/INST]", "{{ x }}", "да", "a"])).map(
        "".join
    ),
)


@pytest.mark.parametrize("tokenizer", [byte(), pieces()], ids=["byte", "sentencepiece"])
@pytest.mark.parametrize("name", SHIPPED)
@settings(deadline=None, max_examples=60)
@given(contents=st.lists(NASTY, min_size=2, max_size=6))
@example(["<|im_end|>", "<|im_start|>assistant\n<|im_end|>\n</s>"])
@example(["\u2028\u00a0\u0085 ", " \u3000 "])
@example(["<s><s></s>", "<<s>"])
def test_any_content_stays_text_and_every_answer_can_be_asked_for(name, tokenizer, contents):
    template = load(name, tokenizer)
    messages = conversation(*contents)
    encoded = template.encode(messages)
    ids = encoded.ids.tolist()
    ends = set()
    for i in range(1, len(messages), 2):
        prompt = template.prompt(messages[:i])
        assert prompt == ids[: len(prompt)]
        answer = encoded.ids[encoded.targets & (encoded.messages == i)]
        assert answer.tolist() == ids[len(prompt) : len(prompt) + len(answer)]
        assert tokenizer.decode(answer[:-1]) == contents[i]
        assert answer[-1] in template.stop_ids
        assert not set(answer[:-1].tolist()) & set(tokenizer.special_ids.values())
        ends |= set(range(len(prompt), len(prompt) + len(answer)))
    assert set(np.flatnonzero(encoded.targets)) == ends, "nothing else is a target"
    assert ids.count(tokenizer.bos_id) == 1
    assert ids[0] == tokenizer.bos_id
    assert encoded.messages[0] == -1
    assert (np.diff(encoded.messages) >= 0).all()
    said = "".join(contents)
    bare = template.render(conversation(*["" for _ in contents]))
    assert len(template.render(messages)) == len(bare) + len(said), "render shows contents as they are"
    assert (template.encode(messages).ids == encoded.ids).all()


ODD = """\
{# whitespace is kept where nothing takes it away #}
{% macro turn(role, text) %}
  [{{ role | upper }}] {{ text }}
{% endmacro %}
{% set ns = namespace(count=0) %}
{% for m in messages %}
    {% if m.role == 'skip' %}{% continue %}{% endif %}
    {% set ns.count = ns.count + 1 %}
    {{ turn(m.role, m.content) }}
  {% if m.role == 'assistant' %}
    {% set x = 'outer' %}
    {% generation %}
      {% set x = 'inner' %}
      {{ m.content }} {{ x }} {{ loop.index }}
    {{ eos_token }}
    {% endgeneration %}
    {{ x }}
  {% endif %}
    {% if loop.index > 30 %}{% break %}{% endif %}
{% endfor %}
{{ ns.count }} {{ messages | tojson }} {{ tools is none }} {{ documents is none }} {{ extra is defined }}
{{ tools[0] | tojson(indent=2) if tools }} {{ missing }} {{ 'a' * 3 }} {{ 2 ** 5 }} {{ "<b>" }} {{ pad_token }}
{% if add_generation_prompt %}

go:
{%- endif %}


"""


def test_rendering_follows_the_settings_of_hugging_face():
    """This text, and that of other templates, was compared with transformers 5.23, byte by byte."""
    template = ChatTemplate(ODD, byte())
    messages = [{"role": "skip", "content": "-"}, *conversation("<é>&", "b", "c")]
    said = json.dumps(messages, ensure_ascii=False)
    expected = "      [USER] <é>&\n\n      [ASSISTANT] b\n\n      b inner 3\n    </s>\n    outer\n      [USER] c\n\n"
    expected += f"3 {said} False True True\n" + '{\n  "д": "<"\n}  aaa 32 <b> <pad>\n\ngo:\n'
    assert template.render(messages, add_generation_prompt=True, tools=[{"д": "<"}], extra=1) == expected
    assert ChatTemplate("{{ eos_token }}|{{ x }}\n", byte()).render(messages, eos_token="mine", x=2) == "mine|2"


def test_keys_that_are_null_are_as_if_absent_and_others_reach_the_template():
    source = (
        "{% for m in messages %}{{ m.name if m.name is defined else m.calls | default([0]) | tojson }};{% endfor %}"
    )
    messages = [
        {"role": "user", "content": "a", "name": "n"},
        {"role": "tool", "content": "", "name": None, "calls": {}},
    ]
    assert ChatTemplate(source, byte()).render([*messages, {**messages[1], "calls": None}]) == "n;{};[0];"


def test_the_clock():
    source = "{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% endif %}"
    assert ChatTemplate(source, byte()).reads_clock
    assert ChatTemplate(source, byte()).render(conversation("a")) == datetime.datetime.now().strftime("%Y")
    for quiet in ("{# strftime_now() #}strftime_now", "{{ 'strftime_now' }}{{ strftime_now is defined }}"):
        assert not ChatTemplate(quiet, byte()).reads_clock


BLOCKS = """\
{%- for m in messages -%}
  {{- '<|im_start|>' + m.role + '\\n' -}}
  {%- if m.role == 'assistant' -%}
    {%- generation -%}
      {{- '' if m.thought is not defined else '(' ~ m.thought ~ ')' if loop.last else '...' -}}
      {{- m.content -}}
      {{- '<|im_end|>' -}}
    {%- endgeneration -%}
    {{- '\\n' -}}
  {%- else -%}
    {{- m.content + '<|im_end|>\\n' -}}
  {%- endif -%}
{%- endfor -%}
{{- '<|im_start|>assistant\\n' if add_generation_prompt -}}
"""


def test_generation_blocks_as_pictures():
    template = ChatTemplate(BLOCKS, byte())
    encoded = template.encode(conversation("u", " v ", "w", ""))
    as_chatml = load("chatml", byte()).encode(conversation("u", " v ", "w", ""))
    for ours, theirs in zip(encoded, as_chatml, strict=True):
        assert ours.tolist() == theirs.tolist()
    assert template.prompt(conversation("u")) == encoded.ids[: len(template.prompt(conversation("u")))].tolist()

    # Thoughts of earlier answers are left out, so the first messages alone are no beginning of the whole.
    messages = conversation("u", "v", "w", "x")
    messages[1]["thought"] = messages[3]["thought"] = "hm"
    assert runs(template.encode(messages), byte()) == [
        (0, -1, "<s>"),
        (0, 0, "<|im_start|>user\nu<|im_end|>\n"),
        (0, -1, "<|im_start|>assistant\n"),
        (1, 1, "...v<|im_end|>"),
        (0, -1, "\n<|im_start|>user\nw<|im_end|>\n"),
        (0, 3, "<|im_start|>assistant\n"),
        (1, 3, "(hm)x<|im_end|>"),
        (0, 3, "\n"),
    ]
    assert byte().decode(template.prompt(messages[:3])) == "user\nu\nassistant\n...v\nuser\nw\nassistant\n"


def test_generation_blocks_decide_what_is_learnt():
    for_the_last = BLOCKS.replace("{%- generation -%}", "{%- if loop.last -%}{%- generation -%}")
    for_the_last = for_the_last.replace("{%- endgeneration -%}", "{%- endgeneration -%}{%- endif -%}")
    encoded = ChatTemplate(for_the_last, byte()).encode(conversation("u", "v", "w", "x"))
    assert [run for run in runs(encoded, byte()) if run[0]] == [(1, 3, "x<|im_end|>")]
    two = BLOCKS.replace("{{- m.content -}}", "</s>{%- endgeneration -%}!{%- generation -%}{{- m.content -}}")
    encoded = ChatTemplate(two, byte()).encode(conversation("u", "v"))
    assert [run for run in runs(encoded, byte()) if run[1] == 1] == [
        (0, 1, "<|im_start|>assistant\n"),
        (1, 1, "</s>"),
        (0, 1, "!"),
        (1, 1, "v<|im_end|>"),
        (0, 1, "\n"),
    ]


CHATML = """\
{%- for m in messages -%}
{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif -%}"""


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        (
            CHATML.replace("m.content", "(m.content if loop.last else '...')"),
            r"messages\[1\].* is written in another way",
        ),
        (CHATML + "{{ '' if add_generation_prompt else eos_token }}", r"messages\[1\].* is written in another way"),
        (CHATML.replace("<|im_end|>", ""), r"messages\[1\].* has no stop token: the first special .* is none"),
        (CHATML.replace("<|im_end|>", "###"), r"messages\[1\].* has no stop token"),
        (
            CHATML.replace("if add_generation_prompt", "if false"),
            r"messages\[1\].* is <\|im_start\|>, which ends no answer",
        ),
        (
            CHATML.replace("m.content", "m.content | replace('c', 'k')"),
            r"messages\[1\].* is not written as its content says",
        ),
    ],
)
def test_answers_that_are_not_certain_are_refused_with_the_message_and_the_mend(source, problem):
    template = ChatTemplate(source, byte())
    with pytest.raises(UserError, match=problem + r".*; in the template, put \{% generation %\} and"):
        template.encode(conversation("a", "bc", "d", "ef"))
    assert template.prompt(conversation("a", "bc", "d")), "such a template can still be sampled from"


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        (
            BLOCKS.replace("{{- '<|im_end|>' -}}", ""),
            r"messages\[1\]: its .* block ends in 'bc', which is no sp",
        ),
        (
            BLOCKS.replace("'<|im_end|>' -}}", "'<|im_end|>..' -}}"),
            r"ends in '<\|im_end\|>\.\.', .* let the stop token be the last in it",
        ),
        (
            BLOCKS.replace("'assistant'", "'model'"),
            r"renders no \{% generation %\} block, so that nothing would be learnt",
        ),
    ],
)
def test_generation_blocks_that_teach_no_end_are_refused(source, problem):
    with pytest.raises(UserError, match=problem):
        ChatTemplate(source, byte()).encode(conversation("a", "bc"))


def test_conversations_without_an_answer_have_no_target():
    for source in (CHATML, BLOCKS):
        assert not ChatTemplate(source, byte()).encode(conversation("a")).targets.any()


def test_names_of_special_tokens_stay_text_wherever_a_message_has_them():
    template = ChatTemplate(CHATML.replace("m.content", "m.content + (m.calls | tojson if m.calls else '')"), byte())
    nasty = {"role": "us<s>er", "content": "<|im_end|>", "calls": {"</s>": ["<|im_start|>"]}}
    encoded = template.encode([nasty, {"role": "assistant", "content": "b"}])
    special = [byte().piece(id) for id in encoded.ids if id >= 256]
    assert special == ["<s>", "<|im_start|>", "<|im_end|>", "<|im_start|>", "<|im_end|>"]
    text = '<|im_start|>us<s>er\n<|im_end|>{"</s>": ["<|im_start|>"]}<|im_end|>\n'
    assert template.render([nasty]) == text
    assert byte().decode(encoded.ids).startswith('us<s>er\n<|im_end|>{"</s>": ["<|im_start|>"]}\n')

    one = ByteTokenizer((*NAMES, "x"))
    assert one.special_ids["x"] not in load("chatml", one).encode(conversation("x", "axe")).ids

    searching = ChatTemplate(CHATML.replace("m.content", "m.content.split('</s>')[-1]"), byte())
    assert searching.render(conversation("a</s>b")) == "<|im_start|>user\nb<|im_end|>\n"
    with pytest.raises(UserError, match="looks into messages for special tokens, and these say some"):
        searching.encode(conversation("a</s>b"))


def test_one_bos():
    def bos(source, tokenizer):
        return np.flatnonzero(ChatTemplate(source, tokenizer).encode(conversation("a", "b")).ids == 257).tolist()

    assert bos(CHATML, byte()) == bos("{{ bos_token }}" + CHATML, byte()) == bos("<s>" + CHATML, byte()) == [0]
    assert bos(CHATML, without_bos()) == []
    assert load("chatml", without_bos()).render(conversation("a")).startswith("<|im_start|>")
    for source in (
        CHATML.replace("'<|im_start|>", "bos_token + '<|im_start|>"),
        "<s>{{ bos_token }}" + CHATML,
        "\n" * 2 + "-<s>" + CHATML,
    ):
        with pytest.raises(
            UserError, match=r"chat_template: writes <s>, the beginning of text, twice, or not at the beg"
        ):
            bos(source, byte())
        with pytest.raises(UserError, match="writes <s>"):
            ChatTemplate(source, byte()).prompt(conversation("a", "b", "c"))
    same = ByteTokenizer(NAMES)
    same.bos_id = same.eos_id
    encoded = ChatTemplate(CHATML.replace("'<|im_end|>\n'", "eos_token"), same).encode(conversation("a", "b"))
    assert np.flatnonzero(encoded.ids == same.eos_id).tolist() == [0, 8, 21], (
        "one token for both is no second beginning"
    )


def test_names_that_the_tokenizer_does_not_have_are_refused():
    few = ByteTokenizer(("<pad>", "<s>", "</s>"))
    with pytest.raises(
        UserError, match=r"chat_template llama3: names <\|end_header_id\|>, <\|eot_id\|>, <\|start_header_id"
    ) as e:
        load("llama3", few)
    assert "the tokenizer's special tokens are <pad>, <s>, </s>" in str(e.value)
    for source in (
        "{{ '<|' ~ messages[0].role ~ '|>' }}",
        "<start_of_turn>",
        "<｜User｜>",
        "{% if 0 %}<|a|>{% endif %}",
    ):
        with pytest.raises(UserError, match="which would be spelled out"):
            ChatTemplate(source, few)
    ChatTemplate("{# <|im_start|> #}<think><b>a <| b |> c{{ '[INST]' }}", few)
    for variable in ("bos_token", "eos_token"):
        bare = without_bos()
        bare.eos_id = -1
        with pytest.raises(UserError, match=f"uses {variable}, but the tokenizer has none"):
            ChatTemplate("{{ " + variable + " }}", bare)
        assert ChatTemplate("{{ 'x' if " + variable + " is defined }}", bare).render(conversation("a")) == ""


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        (
            "{{ ''.__class__.__mro__ }}",
            "line 1 fails with SecurityError: '__class__' of 'str' is not open to templates",
        ),
        ("\n{{ messages[0]|attr('__class__') }}", "line 2 fails with SecurityError"),
        ("{{ '{0.__class__}'.format(1) }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError: 'append' of 'list'"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
        ("{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}", "more than 1,000,000 rounds"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ 'a' * 10 ** 10 }}", r"SecurityError: \* would make something too large"),
        ("{{ 9 ** 9 ** 9 ** 9 }}", r"SecurityError: \*\* would make something too large"),
        ("a\n{{ b( }}", "chat_template, line 2: is not a template: unexpected"),
        ("{% generation %}", "chat_template, line 1: is not a template: .*endgeneration"),
        ("{% break %}", "is not a template: 'break' outside loop"),
        ("\n{{ no.such.thing }}", "line 2 fails with UndefinedError: 'no' is undefined"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% generation %}{% generation %}{% endgeneration %}{% endgeneration %}", "within {% generation %}"),
        ("{{ raise_exception('none of <mine>') }}", "chat_template: refuses the conversation: none of <mine>"),
    ],
)
def test_templates_that_are_wrong_or_wicked_are_refused(source, problem):
    with pytest.raises(UserError, match=problem):
        ChatTemplate(source, byte())


def test_a_branching_macro_ends_too(monkeypatch):
    monkeypatch.setattr(chat, "MOST_ROUNDS", 1000)
    with pytest.raises(UserError, match="more than 1,000 rounds"):
        ChatTemplate(
            "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}", byte()
        )
    ChatTemplate("{% for i in range(999) %}{% endfor %}", byte()).encode(conversation("a", "b", "c")[:1])


def test_what_the_template_refuses_is_told_in_its_words():
    template = load("llama2", byte())
    for roles in (["user", "user"], ["assistant"], ["system", "assistant"], ["user", "system"], ["tool"]):
        with pytest.raises(
            UserError, match=f"llama2: refuses the conversation: a message of {roles[-1]} cannot follow"
        ):
            template.encode([{"role": role, "content": "a"} for role in roles])


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], r"messages: got \[\]; a list of at least one"),
        ("hello", "messages: got 'hello'; a list"),
        (None, "messages: got None; a list"),
        ([*conversation("a"), "b"], r"messages\[1\]: got 'b'; an object"),
        ([{"content": "a"}], r"messages\[0\]\.role: got None; a string"),
        ([*conversation("a"), {"role": "assistant"}], r"messages\[1\]\.content: got None; a string"),
        ([{"role": "user", "content": ["a"]}], r"messages\[0\]\.content: got \['a'\]; a string"),
        ([{"role": 1, "content": "a"}], r"messages\[0\]\.role: got 1; a string"),
        ([{"role": "user", "content": "a\ud83d"}], r"messages\[0\]: holds what is no JSON or no Unicode: .*surrogates"),
        ([{"role": "user", "content": "a", "x": {1, 2}}], r"messages\[0\]: holds what is no JSON"),
        ([{"role": "user", "content": "a\ufdd0"}], r"messages\[0\]: holds U\+FDD0, which no text has"),
        ([{"role": "user", "content": "a", "x": [{"\ufdd2": 1}]}], r"messages\[0\]: holds U\+FDD2"),
    ],
)
def test_what_is_no_conversation_is_refused(messages, problem):
    template = load("chatml", byte())
    for use in (template.render, template.prompt, template.encode):
        with pytest.raises(UserError, match=problem):
            use(messages)


def test_messages_without_special_tokens_between_them():
    """A token belongs to the message in which it begins, by bytes, though none is cut there."""
    source = (
        "{% for m in messages %}{{ m.role }}: {{ m.content ~ ('</s>' if m.role == 'assistant' else ' ') }}{% endfor %}"
    )
    source += "{% if add_generation_prompt %}assistant: {% endif %}"
    messages = [{"role": "é", "content": "д<|im_end|>"}, *conversation("чай", "да"), {"role": "b", "content": "x"}]
    assert runs(ChatTemplate(source, byte()).encode(messages), byte()) == [
        (0, -1, "<s>"),
        (0, 0, "é: д<|im_end|> "),
        (0, 1, "user: чай "),
        (0, 2, "assistant: "),
        (1, 2, "да</s>"),
        (0, 3, "b: x "),
    ]
    encoded = ChatTemplate(source, pieces()).encode(messages)
    prompt = ChatTemplate(source, pieces()).prompt(messages[:2])
    assert prompt == encoded.ids[: len(prompt)].tolist()
    assert prompt[1:] == pieces().encode("é: д<|im_end|> user: чай assistant: ")
    assert [message for message, _ in itertools.groupby(encoded.messages.tolist())] == [-1, 0, 1, 2, 3]


def test_tokenizers_that_put_a_space_in_front_of_each_part():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["[INST] user and of assistant <<SYS>> чай"] * 20),
        model_writer=model,
        vocab_size=330,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    usual = SentencePieceTokenizer(model.getvalue())
    template = load("llama2", usual)
    messages = conversation("of", "and", "чай", "", system="user")
    encoded = template.encode(messages)
    prompt = template.prompt(messages[:2])
    assert prompt == encoded.ids[: len(prompt)].tolist()
    assert usual.decode(encoded.ids[encoded.targets & (encoded.messages == 2)]) == "and"
    assert [message for message, _ in itertools.groupby(encoded.messages.tolist())] == [-1, 0, 1, 2, 3, 4]


def test_templates_are_found_by_name_and_path(tmp_path):
    path = tmp_path / chat.FILE_NAME
    path.write_text(load("chatml", byte()).source)
    assert load(path, byte()).hash == load("chatml", byte()).hash
    with pytest.raises(
        UserError, match=r"chat_template: got 'chatlm', no file and no template; did you mean 'chatml'\?"
    ):
        load("chatlm", byte())
    with pytest.raises(UserError, match="no file and no template"):
        load(tmp_path, byte())
    path.write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"chat_template\.jinja: is not UTF-8"):
        load(path, byte())
    path.write_text("{{ ")
    with pytest.raises(UserError, match=r"chat_template\.jinja, line 1: is not a template"):
        load(path, byte())


def test_the_first_turn_of_llama2_is_the_published_format():
    """Their text but for one space in front of </s>, which would be a target."""
    messages = conversation("u", "a", system="s")
    assert load("llama2", byte()).render(messages) == "<s>[INST] <<SYS>>\ns\n<</SYS>>\n\nu [/INST] a</s>"


def test_jinja_is_recent_enough_for_its_sandbox():
    assert tuple(map(int, jinja2.__version__.split(".")[:3])) >= (3, 1, 6), "older ones have known ways out"
