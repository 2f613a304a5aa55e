import subprocess
import sys

import pytest

from jaxlm.base.errors import UserError
from jaxlm.demo.documentation import documents

MODULES = ("pydoc_data.topics", "json", "numpy.linalg", "textwrap", "jax.nn")


def test_one_document_a_topic_function_or_class():
    found = list(documents(MODULES, "train"))
    where = {document["where"]: document["text"] for document in found}
    assert {document["source"] for document in found} == {*MODULES}
    assert len(where) == len(found)
    assert "lambda" in where["pydoc_data.topics:lambda"]
    assert where["numpy.linalg:norm"].startswith("numpy.linalg.norm\n\nMatrix or vector norm.")
    assert "\n\njson.JSONDecoder.raw_decode\n\n" in where["json:JSONDecoder"]  # a class comes with its methods
    assert "json:JSONDecoder" in where
    assert not any(" at 0x" in text for text in where.values())
    sizes = sorted(map(len, where.values()))
    assert sizes[len(sizes) // 10] > 200
    assert sizes[len(sizes) * 9 // 10] < 8000


def test_same_in_every_process_without_output_or_devices():
    program = f"""
import hashlib
from jaxlm.demo.documentation import documents
found = repr(list(documents({MODULES!r}, "train")))
from jax._src import xla_bridge
assert not xla_bridge._backends, "a device was started"
print(hashlib.sha256(found.encode()).hexdigest())
"""
    runs = [
        subprocess.run([sys.executable, "-c", program], capture_output=True, env={"PYTHONHASHSEED": seed})
        for seed in ("1", "2")
    ]
    assert runs[0].stdout == runs[1].stdout
    assert len(runs[0].stdout) == 65, "something else was printed"
    assert runs[0].stderr == runs[1].stderr == b""


def test_a_module_that_is_not_there_is_named():
    with pytest.raises(UserError, match=r"sources\.docs\.modules: no_such_module cannot be imported"):
        list(documents(["json", "no_such_module"], "train", "sources.docs.modules"))
