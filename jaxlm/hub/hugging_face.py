"""A Hugging Face directory as a model of ours: config, weights tensor by tensor, tokenizer, chat template, defaults.

    directory = read("models/SmolLM2-135M")
    params = directory.load_params(for_inference(directory.config)[1])

Weights come from safetensors, whole or in shards with an index. Nothing is executed: pickles (.bin) are refused, and a
chat template runs in the sandbox of `tokenizer/chat.py`. Names, shapes and types of all tensors are held against the
config before the first of them is read.
"""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import safetensors
from etils import epath

from jaxlm.base import files, precision
from jaxlm.base.errors import UserError
from jaxlm.hub import families, pooling
from jaxlm.hub.family import Family
from jaxlm.hub.generation import Generation
from jaxlm.hub.pooling import Pooling
from jaxlm.hub.rules import LAYER, Rule
from jaxlm.hub.tokenizers import read_template, read_tokenizer
from jaxlm.model.config import ModelConfig
from jaxlm.model.transformer import for_inference
from jaxlm.model.weights import Definition, Params, Weight
from jaxlm.tokenizer.chat import ChatTemplate
from jaxlm.tokenizer.tokenizer import Tokenizer
from jaxlm.train import model_directory, tensor_files

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": precision.dtype("bfloat16")}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One of their tensors, and ours that lie in it."""

    name: str
    shape: tuple[int, ...]
    rule: Rule
    parts: tuple[tuple[str, tuple[int, ...]], ...]
    """(our name, our shape) of each."""
    heads: int
    """Within how many pieces of the outputs the parts follow each other; 1: in all of them."""
    expert: int = -1
    """Which expert's part of ours it is; -1: all of it."""

    def of(self, array: Any) -> np.ndarray:
        """The part of one of ours that lies in it."""
        return array[:] if self.expert < 0 else array[self.expert : self.expert + 1][0]


def tensors_of(family: Family, config: ModelConfig) -> list[Tensor]:
    """All tensors of a model, under their names. Raises UserError where the family has no name for one of ours."""
    definition = for_inference(config)[1]
    shapes = dict(pair for _, declared in definition for pair in model_directory.tensor_shapes(declared))
    left, found = set(shapes), []
    for rule in family.rules:
        places = rule.theirs.count("{}")
        each = range(config.experts.count) if places == 2 else (-1,)
        for layer in range(config.layers if places else 1):
            names = [name.format(layer) for name in rule.ours]
            if names[0] not in left and not (rule.again and names[0] in shapes and not config.tied_embeddings):
                continue
            parts = tuple((name, shapes[name][places == 2 :]) for name in names)
            *rest, last = parts[0][1]
            theirs = (*rest, sum(shape[-1] for _, shape in parts))
            theirs = theirs[::-1] if rule.turned else theirs
            heads = config.heads if rule.by_head else last if rule.in_turn else 1
            name = rule.theirs.removeprefix(family.prefix if family.is_bare(config) else "")
            found += [Tensor(name.format(layer, e), theirs, rule, parts, heads, e) for e in each]
            left -= set(names)
    # A reward model of ours has a bias, theirs has none: `export` writes it into config.json.
    if left - {"score_bias"}:
        raise UserError(f"{family.model_type} models have no {', '.join(sorted(left)[:8])}")
    return found


@dataclasses.dataclass(frozen=True)
class Piece:
    """One of our tensors inside one of theirs, as `model_directory.build` takes it: nothing is read before []."""

    stored: Any
    """safetensors' slice object."""
    tensor: Tensor
    part: int

    def __getitem__(self, index: Any) -> np.ndarray:
        """The part's [index], of which no more is read than it takes (but for heads of several parts: all)."""
        sizes = [shape[-1] for _, shape in self.tensor.parts]
        shape = self.tensor.parts[self.part][1]
        index = index if isinstance(index, tuple) else (index,)
        *rest, last = (*index, *(slice(None),) * (len(shape) - len(index)))
        before = sum(sizes[: self.part])
        if self.tensor.heads == 1:
            begin, end, _ = last.indices(shape[-1])
            wanted = (*rest, slice(before + begin, before + end))
            read = self.stored[wanted[::-1] if self.tensor.rule.turned else wanted]
            return read.T if self.tensor.rule.turned else read
        whole = self.stored[:].T if self.tensor.rule.turned else self.stored[:]
        heads = self.tensor.heads
        split = whole.reshape(*shape[:-1], heads, sum(sizes) // heads)
        own = split[..., before // heads : (before + sizes[self.part]) // heads].reshape(shape)
        return own[(*rest, last)]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[()].astype(np.float32, order="C")


@dataclasses.dataclass(frozen=True)
class Stack:
    """One of our tensors of which every expert's part lies in a tensor of theirs."""

    pieces: list[Piece]

    def __getitem__(self, index: Any) -> np.ndarray:
        first, *rest = index if isinstance(index, tuple) and index else (slice(None),)
        return np.stack([piece[tuple(rest)] for piece in self.pieces[first]])

    __array__ = Piece.__array__


def join(tensor: Tensor, parts: list[np.ndarray]) -> np.ndarray:
    """The inverse of `Piece`: their tensor, from all of ours that lie in it."""
    whole = outputs(tensor, parts)
    return whole.T if tensor.rule.turned else whole


def outputs(tensor: Tensor, parts: list[np.ndarray]) -> np.ndarray:
    """What our parts have along their last axis, in the order of the tensor's outputs."""
    each = [part.reshape(*part.shape[:-1], tensor.heads, -1) for part in parts]
    return np.concatenate(each, axis=-1).reshape(*parts[0].shape[:-1], -1)


def split(tensor: Tensor, whole: np.ndarray) -> list[np.ndarray]:
    """The inverse of `outputs`."""
    ends = np.cumsum([shape[-1] for _, shape in tensor.parts]) // tensor.heads
    pieces = np.split(whole.reshape(*whole.shape[:-1], tensor.heads, -1), ends[:-1], axis=-1)
    return [np.ascontiguousarray(piece.reshape(*whole.shape[:-1], -1)) for piece in pieces]


class HuggingFaceDirectory:
    """A model on disk, of which config and tokenizer are read and the weights are not."""

    described = "config.json"
    """What the tensors are held against."""

    def __init__(self, folder: epath.PathLike, compute: str = ""):
        self.folder = epath.Path(folder)
        self.values = files.read_json(self.folder / "config.json")
        where = f"{self.folder}/config.json"
        self.family = families.family_of(self.values, where)
        self.config = self.family.read(self.values, where)
        self._refuse_what_holds_no_safetensors()
        with self._open() as stored:
            # Before anything is made layer by layer: a config may ask for a billion of them.
            if self.config.layers > len(stored):
                raise UserError(f"{where}: names {self.config.layers} layers, and there are {len(stored)} tensors")
            self._choose_types(stored, compute)

    def _choose_types(self, stored: Mapping[str, Any], compute: str) -> None:
        found = {kind: [name for name in stored if stored[name].get_dtype() == kind] for kind in TYPES}
        self.dtype = max(found, key=lambda kind: len(found[kind]))
        """The type of most tensors."""
        self.other_dtypes = {kind: names for kind, names in found.items() if names and kind != self.dtype}
        computed: Any = compute or ("bfloat16" if self.dtype == "BF16" else "float32")
        self.config = dataclasses.replace(self.config, compute=computed)

    def generation(self) -> Generation:
        return Generation.read(self.folder, self.values)

    @functools.cache  # noqa: B019 (it lives as long as the directory is used)
    def tokenizer(self) -> Tokenizer:
        return read_tokenizer(self.folder, self.config.vocab_size, self.generation())

    def chat_template(self) -> ChatTemplate | None:
        """None where the directory has none."""
        return read_template(self.folder, self.tokenizer())

    def pooling(self) -> Pooling | None:
        """What sentence-transformers makes vectors by; None where the directory does not say."""
        return pooling.read(self.folder)

    def context_tokens(self) -> int:
        """Longest texts that it was made for; 0 where config.json does not say."""
        value = self.values.get("max_position_embeddings") or self.values.get("n_positions")
        return value if isinstance(value, int) else 0

    def load_params(self, definition: Definition, shardings: Any = None) -> Params:
        """The parameters in the definition's layout and types, as `ModelDirectory.load_params` gives them."""
        with self._pieces() as pieces:
            return model_directory.build(definition, pieces, shardings)

    @contextlib.contextmanager
    def opened(self, definition: Definition) -> Iterator[Params]:
        """Parameters like the definition's of which each layer's weight is read when numpy asks for it, in float32."""
        with self._pieces() as pieces:

            def leaf(declared: Weight) -> Any:
                parts = [pieces[name] for name, _ in model_directory.tensor_shapes(declared)]
                return parts if declared.axes[0] == "layers" else parts[0]

            yield definition.tree(leaf)

    @contextlib.contextmanager
    def _pieces(self) -> Iterator[dict[str, Any]]:
        """Our name of a tensor → what reads it; all of them fit the config."""
        with self._open() as stored:
            pieces: dict[str, Any] = {}
            for tensor in self._compared(stored):
                for part, (name, _) in enumerate(tensor.parts):
                    piece = Piece(stored[tensor.name], tensor, part)
                    if tensor.expert < 0:
                        pieces[name] = piece
                    else:
                        pieces.setdefault(name, Stack([])).pieces.append(piece)
            if self.config.criteria:
                pieces["score_bias"] = self._score_bias()
            yield pieces

    def _score_bias(self) -> np.ndarray:
        """What `export` put into config.json; zeros in reward models of others."""
        bias = self.values.get("score_bias", [0.0] * len(self.config.criteria))
        try:
            made = np.array(bias, np.float32)
        except (TypeError, ValueError):
            made = np.zeros(0, np.float32)
        if made.shape != (len(self.config.criteria),):
            raise UserError(f"{self.folder}/config.json: score_bias is {bias!r}; a number a label is needed")
        return made

    def _compared(self, stored: Mapping[str, Any]) -> list[Tensor]:
        """The tensors of the config. Raises UserError with the list of those that differ from what is stored."""
        expected = tensors_of(self.family, self.config)
        problems = [f"missing: {t.name} {list(t.shape)}" for t in expected if t.name not in stored]
        for t in expected:
            if t.name not in stored:
                continue
            shape, kind = tuple(stored[t.name].get_shape()), stored[t.name].get_dtype()
            if shape != t.shape or kind not in TYPES:
                problems.append(f"{t.name}: is {kind}{list(shape)}, but {list(t.shape)} of {' '.join(TYPES)} is needed")
        names = {t.name for t in expected}
        beyond = self._extra_layers()
        for name in stored.keys() - names:
            if name.startswith(beyond):
                continue
            if not name.endswith(self.family.buffers) and not self._is_copy(name, stored):
                problems.append(f"unknown: {name} {stored[name].get_shape()}")
        if problems:
            shown = sorted(problems)[:20] + [f"and {len(problems) - 20} more"] * (len(problems) > 20)
            raise UserError(f"{self.folder}: its tensors do not fit its {self.described}:\n  " + "\n  ".join(shown))
        return expected

    def _extra_layers(self) -> tuple[str, ...]:
        """How names of layers begin that stand in the checkpoint beside the model, as DeepSeek-V3's for more tokens."""
        count = self.values.get(self.family.extra_layers) or 0
        if not isinstance(count, int) or not 0 <= count < 100:
            raise UserError(f"{self.folder}/config.json: {self.family.extra_layers} is {count!r}; a number is needed")
        return tuple(f"{LAYER.format(self.config.layers + number)}." for number in range(count))

    def _is_copy(self, name: str, stored: Mapping[str, Any]) -> bool:
        """Whether it is the output head of a config with tied embeddings, stored again; one that differs is refused."""
        first = {rule.ours: rule.theirs for rule in reversed(self.family.rules)}
        copies = {rule.theirs: first[rule.ours] for rule in self.family.rules if rule.again}
        copies[first["head",]] = first["embedding",]
        original = copies.get(name, "")
        if not self.config.tied_embeddings or original not in stored:
            return False
        if not np.array_equal(stored[name][:], stored[original][:]):
            raise UserError(
                f"{self.folder}: {name} differs from {original}, though config.json has tie_word_embeddings true"
            )
        return True

    def _refuse_what_holds_no_safetensors(self) -> None:
        if (self.folder / WHOLE).exists() or (self.folder / INDEX).exists():
            return
        pickled = [p.name for p in self.folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".h5")]
        if pickled:
            raise UserError(
                f"{self.folder}/{min(pickled)}: is a pickle or an old format, which may run code when it is read; save "
                "the model with safetensors (transformers: save_pretrained)"
            )
        raise UserError(f"{self.folder}: holds neither {WHOLE} nor {INDEX}")

    @contextlib.contextmanager
    def _open(self) -> Iterator[dict[str, Any]]:
        """Tensor name, with its prefix → what gives slices of it: nothing is read."""
        stored: dict[str, Any] = {}
        for file in self._shards():
            path = self.folder / file
            if not path.exists():
                raise UserError(f"{path}: is missing, though {INDEX} names it")
            try:
                stored |= tensor_files.read(path)
            except (safetensors.SafetensorError, OSError) as error:
                raise UserError(f"{path}: is not a sound safetensors file: {error}") from None
        yield self._named(stored)

    def _named(self, stored: dict[str, Any]) -> dict[str, Any]:
        """The names of the config's class: a bare decoder's lack the prefix, GPT-NeoX's head has two names, and BERT's
        norms have old ones."""
        prefix = self.family.prefix
        if self.family.is_bare(self.config):
            stored = {name.removeprefix(prefix): value for name, value in stored.items()}
        elif not any(name.startswith(prefix) for name in stored):
            bare = ("lm_head.", "embed_out.", "score.", "cls.")
            stored = {name if name.startswith(bare) else prefix + name: value for name, value in stored.items()}
        if self.family.model_type == "bert":
            old = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
            stored = {re.sub("LayerNorm.(gamma|beta)$", lambda m: old[m[0]], k): v for k, v in stored.items()}
        if self.family.model_type == "gpt_neox" and "lm_head.weight" in stored:
            stored["embed_out.weight"] = stored.pop("lm_head.weight")
        return stored

    def _shards(self) -> list[str]:
        if not (self.folder / INDEX).exists():
            return [WHOLE]
        index = files.read_json(self.folder / INDEX)
        names = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(names, dict) or not names:
            raise UserError(f"{self.folder}/{INDEX}: has no weight_map")
        for name in names.values():
            if not isinstance(name, str) or "/" in name or "\\" in name or not name.endswith(".safetensors"):
                raise UserError(f"{self.folder}/{INDEX}: names {name!r}, which is no safetensors file beside it")
        return sorted(set(names.values()))


def read(folder: epath.PathLike, compute: str = "") -> HuggingFaceDirectory:
    """Opens a Hugging Face directory; `compute` is the type of matrix products, by default bfloat16 where most tensors
    are that, else float32. Raises UserError for whatever is not understood, by name."""
    return HuggingFaceDirectory(folder, compute)
