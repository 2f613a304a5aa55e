"""Runs a teacher over packed rows once and keeps its likeliest tokens, for `distill.stored` of pretrain and sft.

    python tools/store_teacher.py --teacher=runs/large --rows=runs/demo/pack --output=runs/teacher --top_k=64

Each folder of rows of a mixture takes a call of its own, with one and the same output. The rows of sft are
WORKDIR/rows, which its first start writes. All train rows are read, in batches of --batch_rows over all devices.
"""

import argparse
import sys
from collections.abc import Sequence

from jaxlm import devices
from jaxlm.base import logging
from jaxlm.base.config import MeshConfig
from jaxlm.base.errors import JaxlmError


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="a model directory, a Hugging Face directory or a GGUF file")
    parser.add_argument("--rows", required=True, help="a folder of packed rows")
    parser.add_argument("--output", required=True, help="the folder to keep it in")
    parser.add_argument("--top_k", type=int, default=64, help="tokens a position (default: 64)")
    parser.add_argument("--temperature", type=float, default=1.0, help="divides the logits (default: 1)")
    parser.add_argument("--batch_rows", type=int, default=16, help="rows at a time (default: 16)")
    parser.add_argument("--chunk_tokens", type=int, default=0, help="logits of so many at a time; 0: of all")
    arguments = parser.parse_args(given)
    logging.start()
    try:
        devices.start()
        from jaxlm.base.sharding import make_mesh
        from jaxlm.distill.stored import Asked, store
        from jaxlm.hub.opened import hash_of, open_model

        directory = open_model(arguments.teacher, "teacher")
        asked = Asked(top_k=arguments.top_k, temperature=arguments.temperature)
        where = arguments.output, arguments.rows
        sizes = {"batch_rows": arguments.batch_rows, "chunk_tokens": arguments.chunk_tokens}
        mesh = make_mesh(MeshConfig())
        store(*where, directory, hash_of(arguments.teacher, "teacher"), asked, mesh, **sizes)
    except JaxlmError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
