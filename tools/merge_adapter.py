"""A model directory and an adapter of peft's → the merged model directory.

    python tools/merge_adapter.py runs/base/model runs/tuned/adapter merged

The base is a model directory or a run's folder; of a Hugging Face directory, `python -m jaxlm import --adapter=DIR`
does the same. Stages that train adapters have written their merged model already.
"""

import dataclasses
import functools
import sys

import jax
from etils import epath

from jaxlm.adapters import weights
from jaxlm.base import files
from jaxlm.base.errors import JaxlmError, UserError
from jaxlm.hub import peft
from jaxlm.hub.find import find_model
from jaxlm.hub.tokenizers import read_template
from jaxlm.model import layout
from jaxlm.model.config import adapted
from jaxlm.model.transformer import define_model
from jaxlm.train import model_directory


def main(arguments: list[str]) -> int:
    if len(arguments) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        merge(*arguments)
    except JaxlmError as error:
        print(f"merge_adapter: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def merge(model: str, adapter: str, output: str) -> None:
    """Writes the directory; a verdict of the gate on the base is not one on the result, and is left out."""
    base = model_directory.read(find_model(model))
    if epath.Path(output).exists():
        raise UserError(f"{output}: is there already; give a new folder")
    read = peft.read(adapter, peft.family_of(base), base.config)
    config, flat = read.shape(base.config), dataclasses.replace(base.config, scan_layers=False)
    beside = define_model(adapted(read.shape(flat), read.lora))
    params = read.beside(base.load_params(define_model(flat)), beside)
    whole = jax.jit(functools.partial(weights.merged, config=read.lora))(params)
    model_directory.write(
        output,
        layout.stack(whole, config) if config.scan_layers else whole,
        config,
        base.folder,
        inputs={str(base.folder): base.manifest.hash, adapter: files.sha256(f"{adapter}/{peft.TENSORS}")},
        config={},
        facts={name: value for name, value in base.manifest.facts.items() if name in ("row_length", "hugging_face")},
        chat_template=read_template(epath.Path(adapter), base.tokenizer()) or base.chat_template(),
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
