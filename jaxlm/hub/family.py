"""A family of Hugging Face's models: how its config.json is read as a ModelConfig, and written."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxlm.base.errors import ConfigError, UserError
from jaxlm.hub.fields import Part, Reader, alike
from jaxlm.hub.rules import Rule
from jaxlm.model.config import ModelConfig

MOST_LAYERS = 10_000
CAUSAL, REWARD = "ForCausalLM", "ForSequenceClassification"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    model_type: str
    """As config.json has it."""
    name: str
    """What its classes' names begin with."""
    rules: tuple[Rule, ...]
    parts: tuple[Part, ...]
    """The fields of config.json, read and written part by part."""
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Fields that config.json may leave out, beside those of `fields.DEFAULTS`."""
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Our fields that the family leaves no choice in."""
    only: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of config.json that may have no other value than this (or null)."""
    prefix: str = "model."
    """Names of a checkpoint of the bare decoder lack it."""
    causal: str = ""
    """Its language model's class, where that is not the name and ForCausalLM."""
    reward: str = ""
    """The same for ForSequenceClassification."""
    heads: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Of encoders, class → our `head`, in place of those two; the one without logits is the bare encoder."""
    buffers: tuple[str, ...] = ("rotary_emb.inv_freq",)
    """Ends of names of tensors that older checkpoints hold and that are computed anyway, or that its class lacks."""
    extra_layers: str = ""
    """The field that counts layers which checkpoints may hold past the model's, and which it does not compute with."""

    def classes(self) -> tuple[str, ...]:
        """Its language model's class and its reward model's; an encoder's by their heads."""
        return tuple(self.heads) or (self.causal or self.name + CAUSAL, self.reward or self.name + REWARD)

    def is_bare(self, config: ModelConfig) -> bool:
        """Whether names of its checkpoint lack the prefix."""
        return config.head == "pooler"

    def read(self, values: Mapping[str, Any], where: str) -> ModelConfig:
        """The ModelConfig of a config.json. Raises UserError for what is not understood, each by its name."""
        reader = Reader(values, self.defaults, where)
        classes = reader.take("architectures", list) or [self.classes()[0]]
        if len(classes) != 1 or classes[0] not in self.classes():
            given, known = ", ".join(map(str, classes)), " and ".join(self.classes())
            raise UserError(f"{where}: architectures: {given} is not understood; {known} are")
        made: dict[str, Any] = dict(self.fixed)
        try:
            for part in self.parts:
                made |= part.read(reader, made)
                if made.get("layers", 0) > MOST_LAYERS:  # before anything is made of each
                    raise UserError(f"{where}: gives a model of {made['layers']} layers, of {MOST_LAYERS} at most")
        except ConfigError as error:
            raise UserError(f"{where}: gives a model whose {error}") from None
        if self.heads:
            made["head"] = self.heads[classes[0]]
        elif classes[0] == self.classes()[1]:
            labels = reader.take("id2label", dict) or {"0": "LABEL_0"}
            try:
                names = [str(labels[key]) for key in sorted(labels, key=int)]
            except ValueError:
                raise UserError(f"{where}: id2label is {labels!r}; its keys have to be numbers") from None
            made |= {"criteria": ("overall",) if names == ["LABEL_0"] else tuple(names), "tied_embeddings": False}
        for key, value in self.only.items():
            reader.expect(key, value)
        reader.taken |= {self.extra_layers}
        reader.refuse_the_rest(self.model_type)
        try:
            return ModelConfig(**made).complete()
        except ConfigError as error:
            raise UserError(f"{where}: gives a model whose {error}") from None

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """config.json without what is inert. Raises UserError where `read` would give another config back."""
        by_head = [name for name, head in self.heads.items() if head == config.head]
        name = by_head[0] if by_head else self.classes()[bool(config.criteria)]
        values: dict[str, Any] = {"model_type": self.model_type, "architectures": [name]}
        for part in self.parts:
            values |= part.write(config)
        if config.criteria:
            labels = config.criteria
            values |= {"id2label": {str(i): name for i, name in enumerate(labels)}, "num_labels": len(labels)}
            values |= {"label2id": {name: i for i, name in enumerate(labels)}, "tie_word_embeddings": False}
        differing = alike(self.read(values, self.model_type), config)
        if differing:
            raise UserError(f"{self.model_type} models have another {', '.join(differing)}")
        return values
