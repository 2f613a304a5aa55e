"""Google Cloud's notices that a machine is about to be taken, as its metadata server gives them, before any signal."""

import contextlib
import http.client
import os
import signal
import threading
import urllib.request
from collections.abc import Iterator

import jax

from jaxlm.base.logging import logger

POLL_SECONDS = 5.0  # a notice comes 30 seconds (preemption) to an hour (maintenance of a TPU host) ahead
# https://cloud.google.com/compute/docs/metadata/predefined-metadata-keys: path → its value as long as all is well.
QUIET = {"instance/maintenance-event": "NONE", "instance/preempted": "FALSE"}


@contextlib.contextmanager
def notices() -> Iterator[None]:
    """Sends this process a SIGTERM at the first new notice, from a thread that ends with the block.

    On TPUs, and wherever GCE_METADATA_HOST names the server (as Google's own libraries have it); TPU_SKIP_MDS_QUERY
    says that there is none. A notice that stands already when the run begins is told and not obeyed: what comes is
    known, and every start would end at once.
    """
    host = os.environ.get("GCE_METADATA_HOST", "")
    if not host and (jax.default_backend() != "tpu" or os.environ.get("TPU_SKIP_MDS_QUERY")):
        yield
        return
    host = host or "metadata.google.internal"
    ended = threading.Event()
    standing = {path: read(host, path) for path in QUIET}
    for path, found in standing.items():
        if found not in ("", QUIET[path]):
            logger.warning("%s is %s already; goes on until the machine is taken", path, found)

    def watch() -> None:
        while not ended.wait(POLL_SECONDS):
            for path, quiet in QUIET.items():
                if (found := read(host, path)) not in ("", quiet, standing[path]):
                    logger.warning("%s: %s", path, found)
                    os.kill(os.getpid(), signal.SIGTERM)
                    return

    thread = threading.Thread(target=watch, name="maintenance", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def read(host: str, path: str) -> str:
    """The value of a key; empty where there is no server, or where it has none."""
    request = urllib.request.Request(f"http://{host}/computeMetadata/v1/{path}", headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=POLL_SECONDS) as answer:
            return answer.read(100).decode("ascii", "replace").strip()
    except (OSError, http.client.HTTPException):
        return ""
