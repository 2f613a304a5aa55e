"""generation_config.json: at which tokens a model stops, and how its makers sample from it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from etils import epath

from jaxlm.base import files
from jaxlm.base.errors import UserError

FILE_NAME = "generation_config.json"
# Their name → ours, of SamplingConfig.
SAMPLING = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
}


@dataclasses.dataclass(frozen=True)
class Generation:
    """The file, understood as far as it goes; its other keys are kept and have no effect."""

    values: Mapping[str, Any]
    eos_ids: tuple[int, ...]
    """The tokens that end a text; empty where neither this file nor config.json names one."""
    bos_id: int | None
    pad_id: int | None

    @classmethod
    def read(cls, folder: epath.Path, config: Mapping[str, Any]) -> "Generation":
        """Of a directory with or without the file; config.json's ids stand in for what it leaves out."""
        path = folder / FILE_NAME
        values = files.read_json(path) if path.exists() else {}
        if not isinstance(values, dict):
            raise UserError(f"{path}: is no JSON object")

        def ids(key: str) -> tuple[int, ...]:
            found = values.get(key)
            found = config.get(key) if found is None else found
            listed = [] if found is None else found if isinstance(found, list) else [found]
            if not all(isinstance(id, int) and not isinstance(id, bool) for id in listed):
                raise UserError(f"{path}: {key} is {found!r}; an id, or a list of them, is needed")
            return tuple(id for id in listed if id >= 0)

        one = lambda key: ids(key)[0] if ids(key) else None
        return cls(values, ids("eos_token_id"), one("bos_token_id"), one("pad_token_id"))

    def written(self) -> dict[str, Any]:
        """The file's content, complete without a config.json."""
        ids = {"eos_token_id": [*self.eos_ids], "bos_token_id": self.bos_id, "pad_token_id": self.pad_id}
        return dict(self.values) | ids

    def sampling(self) -> dict[str, Any]:
        """Fields of SamplingConfig that its makers sample with; empty where they take the likeliest token."""
        if not self.values.get("do_sample"):
            return {}
        numbers = {ours: self.values.get(theirs) for theirs, ours in SAMPLING.items()}
        return {name: value for name, value in numbers.items() if isinstance(value, int | float)}
