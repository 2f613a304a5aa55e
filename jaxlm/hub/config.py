"""Configs of the stages that exchange models with Hugging Face's libraries."""

import dataclasses
from typing import ClassVar, Literal

from jaxlm.base.config import StageConfig, check


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportConfig(StageConfig):
    """A Hugging Face directory or a GGUF file as a model of ours."""

    stage: ClassVar[str] = "import"
    runtime_fields: ClassVar[tuple[str, ...]] = ("workdir", "name", "source", "adapter")

    source: str = ""
    """The directory: config.json, safetensors, tokenizer; or a file of llama.cpp's, NAME.gguf, which is dequantised."""
    adapter: str = ""
    """A directory of peft's, LoRA or DoRA, merged into the model; with heads that makes a reward model; empty: none."""
    compute: Literal["auto", "bfloat16", "float32"] = "auto"
    """Type of matrix products; auto: bfloat16 where most of its tensors are that, else float32."""
    chat_template: str = ""
    """chatml, llama2, llama3, the path of a Jinja file, or none; empty: its own."""

    def __post_init__(self):
        check(bool(self.source), "source", "is empty; give a Hugging Face directory or a GGUF file")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig(StageConfig):
    """A model of ours as a Hugging Face directory, or as a GGUF file."""

    stage: ClassVar[str] = "export"
    runtime_fields: ClassVar[tuple[str, ...]] = ("workdir", "name", "model", "output")

    model: str = ""
    """A model directory, or a run's folder."""
    output: str = ""
    """The directory to make; empty: WORKDIR/hugging_face, or WORKDIR/gguf."""
    format: Literal["hugging_face", "gguf"] = "hugging_face"
    """gguf: model.gguf, for llama.cpp and what builds on it (needs the extra gguf)."""
    quantization: Literal["none", "q8_0"] = "none"
    """Type of a GGUF file's matrices: none (they are in `dtype`), or 8 bits with a scale for each 32 numbers."""
    family: str = ""
    """model_type of the class to export for; empty: what it was imported as, else the first that has such models."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the tensors; auto: what they were imported as, else float32."""
    without_verdict: bool = False
    """Export a model that the gate has not passed, too."""

    def __post_init__(self):
        check(bool(self.model), "model", "is empty; give a model directory or a run's folder")
        quantized = self.quantization != "none"
        check(self.format == "gguf" or not quantized, "quantization", "is for GGUF files; set format=gguf")
        check(not quantized or self.dtype == "auto", "dtype", "is not used with quantization=q8_0; leave it out")
