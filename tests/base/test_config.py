"""Overrides, types, errors and help of the config system."""

import dataclasses
import importlib
from typing import Literal

import pytest

from jaxlm.__main__ import STAGES, config_class
from jaxlm.base import config as configs
from jaxlm.base.config import MeshConfig, StageConfig, check
from jaxlm.base.errors import ConfigError, UserError
from jaxlm.config_files import load_config_file
from jaxlm.model.config import LoRAConfig
from jaxlm.preference.config import DPOConfig
from jaxlm.reward.config import RankingSource


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    """Inner."""

    rate: float = 0.5
    """A rate."""
    kind: Literal["a", "b"] = "a"
    """A kind."""
    limit: int | None = None
    """A limit."""
    name: str = ""
    """A name."""

    def __post_init__(self):
        check(self.rate > 0, "rate", f"got {self.rate}; a positive number is needed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer(StageConfig):
    """Outer."""

    stage = "outer"
    runtime_fields = ("workdir", "quick")

    size: int = 4
    """A size."""
    quick: bool = False
    """Quick."""
    sizes: tuple[int, ...] = ()
    """Sizes."""
    inner: Inner = Inner()
    """Inner."""
    items: tuple[Inner, ...] = (Inner(name="first"), Inner(name="second"))
    """Items."""
    other: Inner | None = None
    """Other."""
    words: tuple[str, ...] = ()
    """Words."""


def test_overrides_of_every_type():
    got = configs.override(
        Outer(),
        {
            "size": "1e3",
            "quick": "true",
            "sizes": "1,2,3",
            "inner.rate": "2e-3",
            "inner.kind": "b",
            "inner.limit": "7",
            "items.second.rate": "3",
            "items.0.kind": "b",
            "other.rate": "9",
        },
    )
    assert (got.size, got.quick, got.sizes) == (1000, True, (1, 2, 3))
    assert (got.inner.rate, got.inner.kind, got.inner.limit) == (0.002, "b", 7)
    assert (got.items[1].rate, got.items[0].kind, got.items[0].rate) == (3.0, "b", 0.5)
    assert got.other == Inner(rate=9.0)
    assert configs.override(got, {"inner.limit": "none"}).inner.limit is None


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ("a,b", ("a", "b")),
        ("a, b", ("a", "b")),
        ("", ()),
        ('["\\n", " User:", "Hello, world"]', ("\n", " User:", "Hello, world")),
    ],
)
def test_texts_in_a_list(raw, words):
    assert configs.override(Outer(), {"words": raw}).words == words


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("words", "\n", "words: got '\\n'; write blanks and commas as a JSON list"),
        ("words", "a\n,b", "words: got 'a\\n,b'; write blanks and commas as a JSON list"),
        ("words", '["a"', "words: got '[\"a\"', which is no JSON list"),
        ("sise", "1", "sise: no such field; did you mean 'size' or 'sizes'?"),
        ("inner.rat", "1", "inner.rat: no such field; did you mean 'rate'?"),
        ("size", "four", "size: got 'four'; a whole number is needed"),
        ("size", "1.5", "size: got '1.5'; a whole number is needed"),
        ("size", "nan", "size: got 'nan'; a whole number is needed"),
        ("quick", "maybe", "quick: got 'maybe'; true or false is needed"),
        ("inner.kind", "c", "inner.kind: got 'c'; one of a, b is needed"),
        ("inner.rate", "-1", "inner.rate: got -1.0; a positive number is needed"),
        ("items.second.rate", "0", "items.second.rate: got 0.0; a positive number is needed"),
        ("items.third.rate", "1", "items.third: no such item among 2"),
        ("size.x", "1", "size: has no fields; it is int 4"),
        ("inner", "x", "inner: cannot be set as a whole on the command line"),
    ],
)
def test_wrong_overrides_name_the_field_and_the_mend(path, value, message):
    with pytest.raises(ConfigError) as caught:
        configs.override(Outer(), {path: value})
    assert str(caught.value).startswith(message)


def test_whole_and_part_together_are_refused():
    with pytest.raises(ConfigError, match="both whole and in part"):
        configs.override(Outer(), {"inner": "x", "inner.rate": "1"})


def test_validation_sees_final_values():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Pair:
        low: int = 1
        high: int = 2

        def __post_init__(self):
            check(self.low < self.high, "low", "must be below high")

    assert configs.override(Pair(), {"low": "5", "high": "6"}) == Pair(low=5, high=6)


def test_json_round_trip():
    made = configs.override(Outer(), {"items.second.rate": "3", "other.rate": "9", "sizes": "1,2"})
    assert configs.from_dict(Outer, configs.to_dict(made)) == made
    with pytest.raises(ConfigError, match=r"inner\.rote: no such field; did you mean 'rate'"):
        configs.from_dict(Outer, {"inner": {"rote": 1}})
    with pytest.raises(ConfigError, match=r"size: got 'x' \(str\)"):
        configs.from_dict(Outer, {"size": "x"})


def test_identity_leaves_runtime_fields_out():
    a, b = Outer(workdir="a", quick=True), Outer(workdir="b")
    assert configs.identity(a) == configs.identity(b)
    assert [d[0] for d in configs.differences(configs.identity(a), configs.identity(Outer(size=5)))] == ["size"]


def test_types_in_a_file_are_checked():
    with pytest.raises(ConfigError, match=r"items\.first\.limit: got 'many' \(str\)"):
        configs.check_types(Outer(items=(Inner(name="first", limit="many"),)))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"size: got 2\.0 \(float\)"):
        configs.check_types(Outer(size=2.0))  # type: ignore[arg-type]
    configs.check_types(Outer(inner=Inner(rate=3)))  # a whole number is a number


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(:\n", ":1: "),
        ("x = 1\n", "has no function get_config()"),
        ("def get_config():\n    return 3\n", "returned int; return a stage's config"),
        ("\ndef get_config():\n    return 1 / 0\n", ":3: ZeroDivisionError"),
        ("import no_such_module\n", ":1: ModuleNotFoundError"),
        (
            "from jaxlm.base.config import MeshConfig\n\ndef get_config():\n    return MeshConfig(data=0)\n",
            ":4: data: got 0",
        ),
        # The check that stumbled over a type says nothing of it: the field does.
        (
            "from jaxlm.data.config import MixtureSource as S\n\ndef get_config():\n    return S(path='x', weight='4')",
            ":4: weight: got '4' (str); float is needed",
        ),
    ],
)
def test_broken_config_files_are_named_with_the_line(tmp_path, text, message):
    path = tmp_path / "x.py"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config_file(str(path))
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)


def test_mesh_sizes():
    assert MeshConfig(fsdp=2).sizes(8) == dict(slices=1, data=4, fsdp=2, expert=1, context=1, tensor=1)
    with pytest.raises(ConfigError, match="mesh: fsdp=3 x data=-1|mesh: data=-1 x fsdp=3"):
        MeshConfig(fsdp=3).sizes(8)
    with pytest.raises(ConfigError, match="mesh: data=2 does not divide 8 devices"):
        MeshConfig(data=2).sizes(8)
    with pytest.raises(ConfigError, match="data and fsdp are both -1"):
        MeshConfig(fsdp=-1)


@pytest.mark.parametrize("name", STAGES)
def test_every_field_of_every_stage_has_a_doc(name):
    rows = list(configs.describe(config_class(name)))
    assert len(rows) > 3
    assert [field for field, _, _, doc in rows if not doc] == []


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_has_its_module(name):
    module = importlib.import_module(STAGES[name].module)
    assert module.Config is config_class(name)
    assert config_class(name).stage == name
    assert callable(module.main)
    assert callable(module.validate)


@pytest.mark.parametrize("name", STAGES)
def test_the_defaults_that_help_shows_are_those_that_hold(name):
    """A class that stands at two places with two defaults: each place shows its own."""
    seen = 0
    for path, kind, shown, _ in configs.describe(config_class(name)):
        value = default_at(config_class(name), path.split("."))
        if value is not dataclasses.MISSING and not dataclasses.is_dataclass(value):
            assert shown == repr(value), (path, kind)
            seen += 1
    assert seen > 3


def default_at(cls, path):
    """The default that a stage's config really has; MISSING below a tuple, a None, and what has to be given."""
    field = next(f for f in dataclasses.fields(cls) if f.name == path[0])
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    for part in path[1:]:
        value = getattr(value, part, dataclasses.MISSING)
    return value


def test_help_shows_the_stages_own_learning_rate_and_weight_decay():
    shown = {path: default for path, _, default, _ in configs.describe(config_class("preference"))}
    made = config_class("preference")(model="m", sources=(RankingSource(name="a", path="b"),), dpo=DPOConfig())
    assert shown["optimizer.weight_decay"] == "0.0" == repr(made.optimizer.weight_decay)
    assert (shown["schedule.peak"], shown["schedule.kind"]) == ("1e-06", "'linear'")
    assert (made.schedule.peak, made.schedule.kind) == (1e-6, "linear")
    # Below a field that is None by default, the class's own defaults come with the first part that is set.
    assert shown["lora.rank"] == repr(LoRAConfig().rank)


def test_a_wrong_type_is_told_in_words_of_the_help():
    with pytest.raises(ConfigError) as caught:
        configs.check_types(Outer(sizes=[1, 2]))  # type: ignore[arg-type]
    assert "typing" not in str(caught.value)
    assert "int,... is needed" in str(caught.value)
    with pytest.raises(ConfigError, match=r"inner\.kind: got 3 \(int\); a\|b is needed"):
        configs.check_types(Outer(inner=Inner(kind=3)))  # type: ignore[arg-type]
