"""Import and export hold a tensor at a time, not a file: peak memory of processes of their own.

Of 1.19 GB in bfloat16 (594M parameters, four shards of 229 to 468 MB, the largest tensor 262 MB in float32), import
takes 509 MB beside what its modules take, and export 837.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

pytestmark = pytest.mark.slow

FIXTURES = Path(__file__).parent / "fixtures"
V, D, F, L = 32000, 512, 1536, 12
LARGEST = 4 * V * D
SHAPES = {"model.embed_tokens.weight": (V, D), "lm_head.weight": (V, D), "model.norm.weight": (D,)}
for layer in range(L):
    at = f"model.layers.{layer}."
    SHAPES |= {f"{at}self_attn.{name}_proj.weight": (D, D) for name in "qkvo"}
    SHAPES |= {f"{at}mlp.{name}_proj.weight": (F, D) for name in ("gate", "up")}
    SHAPES |= {f"{at}mlp.down_proj.weight": (D, F)}
    SHAPES |= {f"{at}{name}_layernorm.weight": (D,) for name in ("input", "post_attention")}

# The process's peak in bytes. getrusage's ru_maxrss is the last resort: a process begins with that of the one that
# started it.
PEAK = r"""
import pathlib, re, resource
def peak():
    told = re.findall(r"VmHWM:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())
    return 1024 * int((told or [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss])[0])
"""

# Its arguments, after what all imports take; prints how much higher the peak got.
CHILD = """
import sys
import jaxlm.hub.importing, jaxlm.hub.export
from jaxlm.__main__ import main
before = peak()
code = main(sys.argv[1:])
print(code, peak() - before)
"""


# Reads all tensors of a folder; prints how much more it took at its peak.
READER = """
import sys
from pathlib import Path
from jaxlm.train import tensor_files
tensors = {}
before = peak()
for path in sorted(Path(sys.argv[1]).glob("*.safetensors")):
    tensors |= tensor_files.read(path)
total = sum(tensor[()].nbytes for tensor in tensors.values())
print(total, peak() - before)
"""


def peak_of(*arguments):
    ran = subprocess.run([sys.executable, "-c", PEAK + CHILD, *arguments], capture_output=True, text=True, check=True)
    code, peak = map(int, ran.stdout.split()[-2:])
    assert code == 0, ran.stderr
    return peak


def test_what_was_read_does_not_stay(tmp_path):
    """Of files of 128 MB, tensors of 16: a few of them, and never a file."""
    for number in range(5):
        numbers = {f"{number}.{name}": np.ones((4096, 1024), np.float32) for name in range(8 if number else 4)}
        safetensors.numpy.save_file(numbers, tmp_path / f"model-{number}.safetensors")
    ran = subprocess.run(
        [sys.executable, "-c", PEAK + READER, str(tmp_path)], capture_output=True, text=True, check=True
    )
    total, peak = map(int, ran.stdout.split())
    assert total == 36 * 2**24
    assert peak < 3 * 2**24


def test_the_peaks(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    random = np.random.default_rng(0)
    numbers = {k: random.standard_normal(s, np.float32).astype(ml_dtypes.bfloat16) for k, s in SHAPES.items()}
    safetensors.numpy.save_file(numbers, source / "model.safetensors")
    for path in (FIXTURES / "tokenizer-byte-level").iterdir():
        shutil.copy(path, source / path.name)
    values = json.loads((FIXTURES / "llama/config.json").read_text())
    values |= {"vocab_size": V, "hidden_size": D, "intermediate_size": F, "num_hidden_layers": L}
    values |= {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64}
    (source / "config.json").write_text(json.dumps(values))
    assert peak_of("import", f"--source={source}", f"--workdir={tmp_path}/run") < 2.5 * LARGEST
    arguments = ("export", f"--model={tmp_path}/run", f"--output={tmp_path}/out", "--without_verdict=true")
    assert peak_of(*arguments) < 4 * LARGEST
    again = safetensors.numpy.load_file(tmp_path / "out/model.safetensors")
    for name, array in numbers.items():
        np.testing.assert_array_equal(again[name], array)
