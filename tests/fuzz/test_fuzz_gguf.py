"""GGUF files with bytes turned, cut off, doubled or put in: read, or refused with a message; nothing else."""

from pathlib import Path

import pytest
from harness import damaged_bytes, outcome, quick
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.hub import gguf as reading
from jaxlm.model.transformer import for_inference

FILE = Path(__file__).parent.parent / "hub/fixtures/gguf/llama.gguf"
HEADER = 8000
"""Bytes before its tensors' numbers, and the first of these."""


def opened(path):
    directory = reading.read(path, "float32")
    return directory.load_params(for_inference(directory.config)[1])


def test_the_sound_file_is_read():
    assert opened(FILE)


@quick
@given(data=st.data())
def test_gguf(tmp_path, data):
    sound = FILE.read_bytes()
    (tmp_path / "x.gguf").write_bytes(data.draw(damaged_bytes(sound[:HEADER])) + sound[HEADER:])
    outcome(opened, tmp_path / "x.gguf")


@quick
@given(data=st.data())
def test_gguf_from_any_bytes(tmp_path, data):
    head = b"GGUF\x03\x00\x00\x00" if data.draw(st.booleans()) else b""
    (tmp_path / "x.gguf").write_bytes(head + data.draw(st.binary(max_size=300)))
    assert outcome(opened, tmp_path / "x.gguf") is None


@pytest.mark.parametrize("depth", [10, 5000])
def test_arrays_within_arrays_end(tmp_path, depth):
    """Key "k", an array (9) of one array of one array, …"""
    array = (9).to_bytes(4, "little") + (1).to_bytes(8, "little")
    counts = (0).to_bytes(8, "little") + (1).to_bytes(8, "little")
    key = (1).to_bytes(8, "little") + b"k" + (9).to_bytes(4, "little")
    (tmp_path / "x.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + counts + key + array * depth)
    assert outcome(opened, tmp_path / "x.gguf") is None
