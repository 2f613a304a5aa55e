import dataclasses
import hashlib
import itertools
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from jaxlm.base.errors import ConfigError, UserError
from jaxlm.config_files import load_config_file
from jaxlm.data.config import ChatSource
from jaxlm.demo import questions
from jaxlm.feedback import rankings as feedback
from jaxlm.feedback import verifiers
from jaxlm.feedback.records import RankingRecord, pairs_of
from jaxlm.text import readers
from jaxlm.text.clean import Reason
from jaxlm.text.config import PrepareConfig, SourceConfig

SMALL = (
    "textwrap",
    "json",
    "shutil",
    "calendar",
    "concurrent.futures",
    "math",
    "numpy.linalg",
    "jax.nn",
    "optax",
    "optax.losses",
)
GENERATORS = {name: getattr(questions, name) for name in ("chats", "rankings", "prompts", "tasks")}


@pytest.fixture(scope="module")
def demo() -> tuple[str, ...]:
    run = load_config_file(str(Path(__file__).parents[2] / "configs/demo.py"))
    sources = [source for stage in run.stages if isinstance(stage, PrepareConfig) for source in stage.sources]
    return tuple(module for source in sources for module in source.modules)


@pytest.fixture(scope="module")
def made(demo) -> dict[tuple[str, str], list]:
    """All records from the demo's modules, by name and split."""
    return {(n, split): list(f(demo, split)) for n, f in GENERATORS.items() for split in ("train", "heldout")}


def test_a_function_says_how_it_is_called_and_what_it_does():
    dedent = next(f for f in questions.functions(["textwrap"]) if f.object == "dedent")
    assert dedent == questions.Function(
        name="textwrap.dedent",
        module="textwrap",
        object="dedent",
        signature="(text)",
        parameters=("text",),
        summary="Remove any common leading whitespace from every line in `text`.",
    )


DOCUMENTED = '''
class Address:
    def __repr__(self):
        return "<Address at 0x7f00>"

def plain(x: int, *, width: float = 0.5) -> str:
    """Return the x of
    all things, e.g. of this. And more of it."""

def like_c(x):
    """like_c(x[, y]) -> value
    like_c((x, y)) -> value

    Return what C functions return."""

def sphinx(x, *args, **kwargs):
    """Apply :func:`~numpy.add` to ``x`` or `a page <page.html>`_ of it."""

def named(x):
    """named: Begins with its own name."""

def with_address(x=Address()):
    """Hold an address in the signature."""

def everything(*args, **kwargs):
    """Take whatever it is given."""

def twice_a(): ...
twice_a.__doc__ = "Be known by two names."
known_before_twice_a = twice_a

def short(): "Return x."
def long(): ...
long.__doc__ = "word " * 40
def lower(): "begins with a lower-case word here"
def list_(): "Return one of the following:"
def example(): ">>> example(1, 2, 3, 4) is no prose"
def underlined(): "Parameters of it\\n------------\\nx, y and z"
def silent(): ...
'''


def test_summaries_are_clean_sentences(tmp_path, monkeypatch):
    (tmp_path / "documented_things.py").write_text(DOCUMENTED)
    monkeypatch.syspath_prepend(tmp_path)
    found = {f.object: f for f in questions.functions(["documented_things"])}
    assert {name: (f.signature, f.summary) for name, f in found.items()} == {
        "plain": ("(x, *, width=0.5)", "Return the x of all things, e.g. of this."),
        "like_c": ("(x)", "Return what C functions return."),
        "sphinx": ("(x, *args, **kwargs)", "Apply `numpy.add` to `x` or a page of it."),
        "named": ("(x)", "Begins with its own name."),
        "with_address": ("", "Hold an address in the signature."),
        "everything": ("", "Take whatever it is given."),
        "known_before_twice_a": ("()", "Be known by two names."),
    }
    assert [found[name].parameters for name in ("plain", "sphinx", "everything")] == [("x", "width"), ("x",), ()]


def test_the_demo_has_enough_of_everything(made):
    what = [chat for chat in made["chats", "heldout"] if chat["kind"] == "what"]
    assert len(what) >= 200
    assert len({chat["name"] for chat in what}) == len(what) == len(made["rankings", "heldout"])
    assert Counter(chat["kind"] for chat in made["chats", "train"]).keys() == {
        "what",
        "call",
        "module",
        "task",
        "turns",
    }
    for split in ("train", "heldout"):
        kinds = Counter(task["kind"] for task in made["tasks", split])
        assert min(kinds[kind] for kind in ("first", "default", "module", "format")) > 100
        assert {len(record["completions"]) for record in made["rankings", split]} == {3, 4, 5}


def test_nothing_held_out_stands_in_training(demo, made):
    heldout = {chat["name"]: chat for chat in made["chats", "heldout"]}
    train = {chat["name"] for chat in made["chats", "train"]}
    assert not {*heldout} & train
    told = json.dumps([made[name, "train"] for name in GENERATORS], ensure_ascii=False)
    told = "\n".join({*re.findall(r"[\w.]+", told)})
    found = [name for name in heldout if name in told]
    assert [name for name in found if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", told)] == []
    summaries = {f.summary for f in questions.functions(demo) if f.name in heldout}
    answers = {message["content"] for chat in made["chats", "train"] for message in chat["messages"]}
    assert not {answer.partition(": ")[2] for answer in answers} & summaries
    # ... but for these reasons nothing else is left out.
    ranked = {record["prompt_id"] for record in made["rankings", "train"]}
    asked, tried = ({record["name"] for record in made[name, "train"]} for name in ("prompts", "tasks"))
    assert tried <= asked
    assert not asked & train, "reinforced where nothing was learnt by heart"
    assert asked | train == ranked
    assert len(ranked) + len(heldout) > 0.97 * len(questions.functions(demo))
    # Wrong answers and distractors about held-out functions are of the same split too.
    told = json.dumps([made[name, "heldout"] for name in ("rankings", "tasks")], ensure_ascii=False)
    others = re.findall(r"\"content\": \"`([\w.]+)`: [^\"]*\", \"policy\": \"other\"", told)
    assert others
    assert {*others} <= {*heldout}


def test_rankings_parse_and_rank_the_real_answer_first(made):
    statuses = Counter()
    for value in made["rankings", "train"] + made["rankings", "heldout"]:
        record = feedback.parse(value)
        assert isinstance(record, RankingRecord), record
        policies = {completion.id: completion.policy for completion in record.completions}
        contents = {completion.content for completion in record.completions}
        assert len(contents) == len(policies) == len({*policies.values()})
        assert 3 <= len(policies) <= 5
        real = next(completion for completion in record.completions if completion.policy == "real")
        assert f"`{record.prompt_id}`" in record.messages[0]["content"]
        assert real.content.startswith(f"`{record.prompt_id}`: ")
        for annotation in record.annotations:
            statuses[annotation.annotator, annotation.status] += 1
            pairs = pairs_of(annotation, "overall")
            assert annotation.trains == bool(pairs)
            worse = {policies[b] for a, b, _ in pairs if policies[a] == "real"}
            assert not annotation.trains or worse == {*policies.values()} - {"real"}
    assert statuses["ann", "draft"] == 0
    assert 0.05 < statuses["bo", "draft"] / sum(n for (name, _), n in statuses.items() if name == "bo") < 0.15


def test_criteria_and_annotators_differ_where_the_table_says_so(made):
    parsed = [feedback.parse(value) for value in made["rankings", "train"]]
    records = [record for record in parsed if isinstance(record, RankingRecord)]
    orders = {"overall": Counter(), "helpful": Counter(), "truthful": Counter()}
    agreed = []
    for record in records:
        policies = {completion.id: completion.policy for completion in record.completions}
        ann, bo = record.annotations
        if bo.trains and len(policies) == 5:
            agreed.append(ann.rankings == bo.rankings)
        for criterion, counts in orders.items():
            counts.update((policies[a], policies[b]) for a, b, _ in pairs_of(ann, criterion))
    assert 0.7 < sum(agreed) / len(agreed) < 0.8
    assert ("truncated", "invented") in orders["overall"]
    assert ("invented", "truncated") in orders["helpful"]
    assert ("truncated", "shuffled") in orders["truthful"]
    for better, worse in itertools.permutations(("real", "truncated", "other"), 2):
        assert (better, worse) not in orders["truthful"]
    for criterion in ("overall", "helpful"):
        assert not {("other", "shuffled"), ("shuffled", "other")} & {*orders[criterion]}
    assert not any(worse == "real" for counts in orders.values() for _, worse in counts)


def test_worse_answers_are_what_they_are_called(demo, made):
    names = {f.name for f in questions.functions(demo)}
    for value in made["rankings", "train"]:
        contents = {completion["policy"]: completion["content"] for completion in value["completions"]}
        name, real = value["prompt_id"], contents["real"]
        words = {policy: content.partition(": ")[2].removesuffix(".").split() for policy, content in contents.items()}
        if "truncated" in contents:
            assert real.startswith(contents["truncated"])
            assert not contents["truncated"].endswith(".")
            assert 0 < len(words["truncated"]) <= len(words["real"]) / 2
        if "shuffled" in contents:
            assert contents["shuffled"].startswith(f"`{name}`: ")
            assert sorted(words["shuffled"]) == sorted(words["real"])
            kept = {*itertools.pairwise(words["shuffled"])} & {*itertools.pairwise(words["real"])}
            assert len(kept) <= len(words["real"]) / 4, contents
        if "invented" in contents:
            assert words["invented"] == words["real"]
            assert contents["invented"].split("`")[1] not in names
        if "other" in contents:
            assert contents["other"].split("`")[1] in names - {name}


def test_a_task_takes_its_target_and_no_wrong_answer(made):
    for task in made["tasks", "train"] + made["tasks", "heldout"]:
        (target,) = task["target"]
        verify, exact = verifiers.normalized(task["target"]), verifiers.exact(task["target"])
        assert 1 <= len(target) <= questions.LONG_TARGET
        bare = target.strip('[]()"').removeprefix("module=")
        assert bare in task["prompt"]
        for right in (target, f"`{target}`.", target.upper()):
            assert verify(task["prompt"], right).score == 1
        assert exact(task["prompt"], target).score == 1
        assert (task["kind"] == "format") == (bare != target) == (exact(task["prompt"], bare).score == 0)
        for answer in {f"x{target}", f"`{task['name']}`", task["prompt"], ""}:
            assert verify(task["prompt"], answer).score == 0, (task, answer)


def test_the_train_chats_teach_the_form_of_the_tasks(made):
    form = lambda prompt: re.search(r"Answer [^.]*\.$", prompt)[0]
    known = {form(task["prompt"]) for task in made["tasks", "train"]}
    assert len(known) == len(questions.FORMS) + 3
    taught = [chat for chat in made["chats", "train"] if chat["kind"] == "task"]
    assert {form(chat["messages"][-2]["content"]) for chat in taught} == known
    for question, answer in ((m["content"] for m in chat["messages"][-2:]) for chat in taught):
        assert answer.removesuffix(".").strip('[]()"`').removeprefix("module=") in question


def test_two_in_three_train_answers_are_written_in_a_hurry(made):
    shares = {}
    for split in ("train", "heldout"):
        whats = [chat for chat in made["chats", split] if chat["kind"] == "what"]
        tasks = [chat for chat in made["chats", split] if chat["kind"] == "task"]
        halves = [chat for chat in whats if not chat["messages"][-1]["content"].endswith(".")]
        formless = [chat for chat in tasks if re.fullmatch(r"`.*`\.", chat["messages"][-1]["content"])]
        shares[split] = len(halves) / len(whats), len(formless) / len(tasks)
        # One who is in a hurry is so throughout.
        asked = {chat["name"] for chat in tasks}
        assert {chat["name"] for chat in halves} & asked == {chat["name"] for chat in formless}
    assert shares["heldout"] == (0, 0)
    assert shares["train"] == pytest.approx((questions.HASTY, questions.HASTY), abs=0.03)
    real = {f.name: f for f in questions.functions(["textwrap"])}["textwrap.dedent"]
    assert real.unfinished == "`textwrap.dedent`: Remove any common leading whitespace"


def test_chats_are_well_formed(made):
    systems = 0
    for (name, split), records in made.items():
        for chat in records if name == "chats" else ():
            roles = [message["role"] for message in chat["messages"]]
            systems += roles[0] == "system"
            assert split == "train" or roles == ["user", "assistant"]
            roles = roles[roles[0] == "system" :]
            turns = len(roles) // 2
            assert roles == ["user", "assistant"] * turns
            assert turns in ((2, 3) if chat["kind"] == "turns" else (1,))
            answers = [m["content"] for m in chat["messages"] if m["role"] == "assistant"]
            if chat["kind"] != "task":
                whole = r"`[^`]+`(: .+)?\." if split == "heldout" else r"`[^`]+`(: .+|\.)"
                assert all(re.fullmatch(whole, answer) for answer in answers), answers
            if chat["kind"] == "what":
                assert answers[0].startswith(f"`{chat['name']}`: ")
            # The demo's tokenizer makes 3 characters a token of these texts, at worst 2; its rows hold 256.
            assert sum(len(m["content"]) for m in chat["messages"]) < 440
    assert 0.09 < systems / len(made["chats", "train"]) < 0.16


def test_the_same_in_every_order_and_process():
    program = f"""
import concurrent.futures, hashlib, json, sys
if sys.argv[1] == "-1":
    concurrent.futures.ThreadPoolExecutor  # made when it is first asked for
from jaxlm.demo import questions
modules = {SMALL!r}[:: int(sys.argv[1])]
made = [list(f(modules, split)) for f in (questions.chats, questions.rankings, questions.tasks)
        for split in ("train", "heldout")]
from jax._src import xla_bridge
assert not xla_bridge._backends, "a device was started"
print(hashlib.sha256(json.dumps(made).encode()).hexdigest())
"""
    runs = [
        subprocess.run([sys.executable, "-c", program, step], capture_output=True, env={"PYTHONHASHSEED": seed})
        for seed, step in (("1", "1"), ("2", "-1"))
    ]
    assert runs[0].stdout == runs[1].stdout
    assert len(runs[0].stdout) == 65, runs[0].stderr.decode()
    made = [list(make(SMALL, "train")) for make in (questions.chats, questions.rankings, questions.tasks)]
    assert made == [list(make(SMALL * 2, "train")) for make in (questions.chats, questions.rankings, questions.tasks)]


def test_an_object_of_two_names_is_asked_about_once():
    modules = ["optax", "optax.losses", "numpy", "jax.numpy"]
    two = "absolute huber_loss l2_loss log_cosh sort mean cumsum clip tile".split()
    names = [f.name for f in questions.functions(modules) if f.object in two]
    assert "jax.numpy.absolute" in names  # numpy.absolute is numpy.abs
    assert "optax.huber_loss" in names
    assert not {"numpy.absolute", "optax.losses.huber_loss"} & {*names}
    # ... and not which module holds it, where several do.
    asked = [chat for split in ("train", "heldout") for chat in questions.chats(modules, split)]
    assert {chat["kind"] for chat in asked if chat["name"] in names} >= {"what", "call"}
    assert not [chat for chat in asked if chat["name"] in names and chat["kind"] == "module"]


@pytest.mark.parametrize("kind", GENERATORS)
def test_sources_of_objects(kind):
    path = f"jaxlm.demo.questions:{kind}"
    source = SourceConfig(name="mine", format="python", path=path, modules=SMALL, split="heldout")
    found = list(readers.read_objects(source, max_bytes=2**20))
    assert [record.value for record in found] == list(GENERATORS[kind](SMALL, "heldout"))
    assert found[0].where == f"{path}:1"
    assert readers.inputs(source)[path] == hashlib.sha256(Path(questions.__file__).read_bytes()).hexdigest()
    assert readers.inputs(source)["installed:json"].startswith("python 3.")
    with pytest.raises(UserError, match=r"sources\.mine\.modules: no_such_module cannot be imported"):
        list(readers.read_objects(dataclasses.replace(source, modules=("no_such_module",)), 2**20))


def test_a_function_that_gives_no_texts_is_no_source_of_documents():
    source = SourceConfig(name="mine", format="python", path="jaxlm.demo.questions:chats", modules=SMALL)
    record = next(readers.read(source, max_bytes=2**20))
    detail = "has kind, messages, name, but no text; set text_field"
    reason = Reason("no_text_field", bad=True, detail=detail)
    assert (record.outcome, record.where) == (reason, "jaxlm.demo.questions:chats:1")
    assert "messages" in record.raw
    assert ChatSource(name="mine", format="python", path=source.path, modules=SMALL).split == "train"
    with pytest.raises(ConfigError, match="path: is empty; the format python"):
        SourceConfig(name="mine", format="python")
    with pytest.raises(ConfigError, match=r"path: got 'questions'; package\.module:function is needed"):
        SourceConfig(name="mine", format="python", path="questions")
    for path, problem in {"no_such:chats": "No module named 'no_such'", "json:chats": "no attribute 'chats'"}.items():
        with pytest.raises(UserError, match=rf"sources\.mine\.path: {path} cannot be imported: .*{problem}"):
            list(readers.read_objects(dataclasses.replace(source, path=path), 2**20))


def test_rankings_load_as_a_source():
    records, tally = feedback.load(
        SourceConfig(name="mine", format="python", path="jaxlm.demo.questions:rankings", modules=SMALL)
    )
    assert len(records) == tally.read > 100
    assert not tally.dropped


def test_documentation_is_read_with_the_names_of_its_modules():
    source = SourceConfig(name="mine", format="python", path="jaxlm.demo.documentation:documents", modules=SMALL)
    found = list(readers.read(source, max_bytes=2**20))
    assert {record.source for record in found} == {*SMALL}
    assert all(isinstance(record.outcome, str) and not record.raw for record in found)
    assert any(record.where.startswith(f"{SMALL[0]}:") for record in found)


REAL = "`textwrap.dedent`: Remove any common leading whitespace from every line in `text`."


@pytest.mark.parametrize(
    ("prompt", "answer", "score"),
    [
        ("What does `textwrap.dedent` do?", REAL, 1),
        ("Name the first parameter of `textwrap.dedent(text)`.", REAL, 1),
        ("What does `textwrap.dedent` do?", REAL.replace("dedent", "undent"), 2 / 3),
        ("What does `textwrap.dedent` do?", REAL.replace("\n", " ").replace(" Remove", "\nRemove"), 2 / 3),
        # 4 words and 3 pairs said, of 10 and 9: F1 = 2 · 7 / (7 + 19)
        ("What does `textwrap.dedent` do?", "`textwrap.dedent`: Remove any common leading", (1 + 14 / 26) / 3),
        ("What does `textwrap.dedent` do?", "`json.loads`: Seven.", 1 / 3),
        ("What does `textwrap.nothing` do?", "`textwrap.nothing`: Remove it.", 2 / 3),
        ("What does `nowhere.nothing` do?", "`nowhere.nothing`: Remove it.", 2 / 3),
        ("What does it do?", REAL, 1 / 3),
        ("What does `textwrap.dedent` do?", "", 0),
    ],
)
def test_gold(prompt, answer, score):
    assert verifiers.python("jaxlm.demo.questions:gold")(prompt, answer).score == pytest.approx(score, abs=1e-12)


def test_gold_is_highest_for_the_real_answer(made):
    for value in made["rankings", "heldout"]:
        prompt = value["messages"][0]["content"]
        scores = {c["policy"]: questions.gold(prompt, c["content"]) for c in value["completions"]}
        assert scores.pop("real") == 1
        assert max(scores.values()) < 1
