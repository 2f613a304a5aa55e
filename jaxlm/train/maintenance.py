"""Google Cloud's notices that a machine is about to be taken, as its metadata server gives them, before any signal."""

import contextlib
import http.client
import os
import threading
import urllib.request
from collections.abc import Iterator

import jax

from jaxlm.base.logging import logger
from jaxlm.train.signals import Stop

POLL_SECONDS = 5.0  # a notice comes 30 seconds (preemption) to an hour (maintenance of a TPU host) ahead
# https://cloud.google.com/compute/docs/metadata/predefined-metadata-keys: path → its value as long as all is well.
QUIET = {"instance/maintenance-event": "NONE", "instance/preempted": "FALSE"}


@contextlib.contextmanager
def notices(stop: Stop) -> Iterator[None]:
    """Requests a stop at the first notice, as SIGTERM does, from a thread that ends with the block.

    On TPUs, and wherever GCE_METADATA_HOST names the server (as Google's own libraries have it); TPU_SKIP_MDS_QUERY
    says that there is none.
    """
    host = os.environ.get("GCE_METADATA_HOST", "")
    if not host and (jax.default_backend() != "tpu" or os.environ.get("TPU_SKIP_MDS_QUERY")):
        yield
        return
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(POLL_SECONDS):
            for path, quiet in QUIET.items():
                if (found := read(host or "metadata.google.internal", path)) not in ("", quiet):
                    logger.warning("%s: %s: saving after this step, then stopping", path, found)
                    stop.request(found)
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
