"""What has to fit together before a stage trains: batch, rows, mesh and model."""

from typing import Protocol, runtime_checkable

from jaxlm.base import sharding
from jaxlm.base.config import MeshConfig
from jaxlm.base.errors import ConfigError
from jaxlm.model.config import ModelConfig


@runtime_checkable  # the tests check arguments' types, and an instance of any other protocol cannot be told
class Batches(Protocol):
    """What the configs of stages that train on rows have."""

    @property
    def mesh(self) -> MeshConfig: ...
    @property
    def batch_rows(self) -> int: ...
    @property
    def accumulate(self) -> int: ...
    @property
    def row_length(self) -> int: ...


def require_batch_fits(config: Batches, device_count: int, chunk_tokens: int = 0) -> None:
    """Raises ConfigError where rows, pieces or chunks do not divide; a `row_length` of 0 is not known yet."""
    batch_rows, accumulate, row_length = config.batch_rows, config.accumulate, config.row_length
    sizes = config.mesh.sizes(device_count)
    pieces = sharding.batch_pieces(sizes)
    if sizes["context"] > 1 and row_length % sizes["context"]:
        raise ConfigError("mesh.context", f"{sizes['context']} does not divide rows of {row_length} tokens")
    tokens = batch_rows * row_length // accumulate
    if chunk_tokens and tokens % chunk_tokens:
        raise ConfigError("loss_chunk_tokens", f"{chunk_tokens} does not divide the {tokens} of a piece")
    if batch_rows % (pieces * accumulate):
        raise ConfigError(
            "batch_rows",
            f"{batch_rows} rows do not divide among {pieces} parts of the mesh in {accumulate} pieces; a multiple of "
            f"{pieces * accumulate} is needed",
        )


def require_model_fits(mesh: MeshConfig, device_count: int, model: ModelConfig) -> None:
    """Raises ConfigError where the mesh does not divide the heads or the experts."""
    tensor, expert = (mesh.sizes(device_count)[axis] for axis in ("tensor", "expert"))
    if model.experts.count % expert:
        raise ConfigError("mesh.expert", f"{expert} does not divide model.experts.count {model.experts.count}")
    for field in ("heads", "kv_heads"):
        if getattr(model, field) % tensor:
            raise ConfigError("mesh.tensor", f"{tensor} does not divide model.{field} {getattr(model, field)}")
