"""What the fuzz tests share: hostile inputs, and what may become of them: a value, or one message for the user."""

import json
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from jaxlm.base.errors import JaxlmError
from jaxlm.train.step_folder import Damaged

quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

NUMBERS = (0, -1, 1, 2**31, 2**32, 2**63, 2**64, -(2**63), 10**30, 1e308, 0.5)
TEXTS = (
    "",
    "\x00",
    "../../etc/passwd",
    "/etc/passwd",
    "~",
    "..\\x",
    "a" * 300,
    "\ud83d",
    "\u202e",
    "</s>",
    "{{",
    "NaN",
)

scalars = st.one_of(
    st.none(), st.booleans(), st.sampled_from(NUMBERS), st.sampled_from(TEXTS), st.integers(), st.floats(), st.text()
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def outcome(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function gives; None where it refuses with a message of ours. Everything else goes through."""
    try:
        return function(*arguments)
    except (JaxlmError, Damaged) as error:
        if not str(error).strip():
            raise ValueError("a refusal without a word") from error
        return None


@st.composite
def damaged_bytes(draw: st.DrawFn, sound: bytes) -> bytes:
    """A sound file with some bytes turned, cut off, doubled or put in."""
    content = bytearray(sound)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        match draw(st.sampled_from(["turn", "cut", "double", "insert"])):
            case "turn" if content:
                content[at] ^= draw(st.integers(1, 255))
            case "cut":
                del content[at:]
            case "double":
                content[at:at] = content[at : at + 16]
            case "insert":
                content[at:at] = draw(st.binary(max_size=8))
    return bytes(content)


@st.composite
def damaged_json(draw: st.DrawFn, sound: Any) -> Any:
    """The same JSON with some values, at any depth, replaced, left out or put in."""
    tree = json.loads(json.dumps(sound))
    for _ in range(draw(st.integers(1, 3))):
        node, key = tree, None
        inside: list[tuple[Any, Any]] = []
        while isinstance(node, dict | list) and node:
            key = draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
            inside.append((node, key))
            node = node[key]
        if not inside:
            return draw(values)
        parent, key = draw(st.sampled_from(inside))
        match draw(st.sampled_from(["replace", "remove", "add"])):
            case "replace":
                parent[key] = draw(values)
            case "remove":
                del parent[key]
            case "add" if isinstance(parent, dict):
                parent[draw(st.sampled_from(TEXTS) | st.text(max_size=8))] = draw(values)
    return tree
