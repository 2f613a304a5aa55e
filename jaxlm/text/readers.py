"""Records out of files: text where there is one, else the reason why not, and always where it stood.

    >>> next(read(SourceConfig(name="mine", path="a.jsonl"), max_bytes=2**20))
    Record(where='a.jsonl:1', outcome='some text', raw='', source='mine')

A record that is bad by itself becomes a `Reason`; a file that is damaged as a whole (cut off, not Parquet) is an error.
"""

import gzip
import importlib
import inspect
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from etils import epath

from jaxlm.base import files
from jaxlm.base.errors import UserError, nearest
from jaxlm.text import installed
from jaxlm.text.clean import Reason, parts
from jaxlm.text.config import Source, SourceConfig, Split

BLOCK = 1 << 18  # bytes read at a time
TOO_LARGE = Reason("longer_than_max_record_bytes", bad=True)
BROKEN_UTF8 = Reason("broken_utf8", bad=True)

ENDINGS = {
    "jsonl": (".jsonl", ".jsonl.gz", ".jsonl.zst"),
    "text": (".txt",),
    "markdown": (".md", ".markdown"),
    "parquet": (".parquet",),
    "array_record": (".array_record",),
}


class Record(NamedTuple):
    where: str
    """file:line, file:row, dataset:number, function:number, or what the function says"""
    outcome: str | Reason
    raw: str
    """What a bad record says, with bytes that are no UTF-8 written as \\xNN; empty for a good one."""
    source: str


def read(source: SourceConfig, max_bytes: int) -> Iterator[Record]:
    """All records of a source, in an order that does not change. `max_bytes` bounds what is read into memory."""
    if source.format == "python":
        for where, value, raw in _made(source):
            named = value if isinstance(value, dict) else {}
            outcome, shown = _with_raw(text_of(value, source.text_field), raw or str(value))
            yield Record(str(named.get("where", where)), outcome, shown, str(named.get("source", source.name)))
    elif source.format == "tfds":
        yield from (Record(where, outcome, raw, source.name) for where, outcome, raw in _tfds(source))
    else:
        for path, reader in _files(source):
            try:
                for number, (outcome, raw) in reader(path, source.text_field, max_bytes):
                    if reader is _whole_file and source.part_characters and isinstance(outcome, str):
                        for part, text in enumerate(parts(outcome, source.part_characters), 1):
                            yield Record(f"{path}:{part}", text, "", source.name)
                    else:
                        yield Record(f"{path}:{number}", outcome, raw, source.name)
            except (OSError, EOFError, zlib.error) as error:
                raise UserError(f"{path}: cannot be read to its end: {error}; is the file cut off?") from error


class ObjectRecord(NamedTuple):
    where: str
    value: dict[str, Any] | Reason
    raw: str
    """As in `Record`."""


def read_split(source: Source, split: Split, max_bytes: int) -> Iterator[ObjectRecord]:
    """The objects of one split of a source."""
    records = enumerate(read_objects(source, max_bytes))
    return (record for number, record in records if source.split_of(number) == split)


def read_objects(source: Source, max_bytes: int) -> Iterator[ObjectRecord]:
    """The whole objects of a source (chats, pairs): of JSONL, ArrayRecord of JSON, Parquet, TFDS or a function."""
    if source.format == "python":
        yield from _made(source)
        return
    if source.format == "tfds":
        builder, records = _tfds_records(source)
        for number in range(len(records)):
            yield ObjectRecord(f"{builder.info.full_name}:{number}", _plain(records[number]), "")
        return
    for path, reader in _files(source):
        objects = OBJECT_READERS.get(reader)
        if objects is None:
            raise UserError(f"{path}: holds text, not objects; .jsonl, .parquet or .array_record is needed here")
        try:
            for number, value, raw in objects(path, max_bytes):
                shown = raw.decode(errors="backslashreplace") if isinstance(value, Reason) else ""
                yield ObjectRecord(f"{path}:{number}", value, shown)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path}: cannot be read to its end: {error}; is the file cut off?") from error


def _plain(value: Any) -> Any:
    """What TFDS gives, in JSON's types; a sequence of objects comes as an object of sequences and is turned round."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _made(source: Source) -> Iterator[ObjectRecord]:
    """What the user's function yields. Raises UserError, naming the source, for whatever it raises."""
    make = _function(source)
    try:
        for number, value in enumerate(make(source.modules, source.split), 1):
            good = value if isinstance(value, dict) else Reason("not_a_json_object", bad=True)
            yield ObjectRecord(f"{source.path}:{number}", good, "" if good is value else repr(value))
    except UserError as error:
        raise UserError(f"sources.{source.name}.{error}") from error
    except Exception as error:
        raise UserError(f"sources.{source.name}.path: {source.path} raised {type(error).__name__}: {error}") from error


def _function(source: Source) -> Callable[[Sequence[str], str], Iterable[dict[str, Any]]]:
    """The function that a source of the format python names."""
    module, _, name = source.path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"sources.{source.name}.path: {source.path} cannot be imported: {error}") from error


def inputs(source: Source) -> dict[str, str]:
    """What the source consists of → a hash or version of each."""
    if source.format == "python":
        own = {source.path: files.sha256(inspect.getfile(_function(source)))}
        return own | {f"installed:{module}": installed.version(module) for module in source.modules}
    if source.format == "tfds":
        return {f"tfds:{source.path}": f"{_tfds_builder(source).info.full_name} {source.tfds_split}"}
    return {str(path): files.sha256(path) for path, _ in _files(source)}


# A file's reader gives (line or row, (outcome, raw)), or (line or row, object, raw) for whole objects.
_Outcome = tuple[str | Reason, str]
_Reader = Callable[[epath.Path, str, int], Iterator[tuple[int, _Outcome]]]
_Object = tuple[int, dict[str, Any] | Reason, Any]


def _files(source: Source) -> list[tuple[epath.Path, _Reader]]:
    """The source's files, each with its reader. Raises UserError for no file and for an ending that says nothing."""
    field = f"sources.{source.name}.path"
    wanted = tuple(ENDINGS) if source.format == "auto" else (source.format,)
    known = tuple(ending for kind in wanted for ending in ENDINGS[kind])
    found: list[tuple[epath.Path, _Reader]] = []
    for path in files.expand(source.path, field):
        if path.is_dir():
            inside = [path / name for name in files.walk(path) if name.endswith(known)]
            if not inside and "*" not in source.path:
                raise UserError(f"{field}: {path} holds no file that ends in {', '.join(known)}")
            found += [(file, READERS[_kind(file)]) for file in inside]
        elif source.format != "auto":
            found.append((path, READERS[source.format]))
        elif path.name.endswith(known):
            found.append((path, READERS[_kind(path)]))
        else:
            raise UserError(f"{field}: {path} ends in none of {', '.join(known)}; set sources.{source.name}.format")
    if not found:
        raise UserError(f"{field}: {source.path} matches no file that ends in {', '.join(known)}")
    return found


def _kind(path: epath.Path) -> str:
    return next(kind for kind, endings in ENDINGS.items() if path.name.endswith(endings))


def _jsonl(path: epath.Path, text_field: str, max_bytes: int) -> Iterator[tuple[int, _Outcome]]:
    for number, value, raw in _jsonl_objects(path, max_bytes):
        yield number, _with_raw(text_of(value, text_field), raw)


def text_of(value: dict[str, Any] | Reason, text_field: str) -> str | Reason:
    """The text of an object, or the reason why it has none."""
    if isinstance(value, Reason):
        return value
    keys = f"has {', '.join(sorted(value)[:9])}, but no {text_field}; set text_field"
    return _checked(value[text_field]) if text_field in value else Reason("no_text_field", bad=True, detail=keys)


def _jsonl_objects(path: epath.Path, max_bytes: int) -> Iterator[_Object]:
    with path.open("rb") as file:
        for number, line in enumerate(_lines(_blocks(file, path.name), max_bytes), 1):
            if number == 1 and line is not None:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line is None:
                yield number, TOO_LARGE, b""
            elif line.strip():
                yield number, _from_json(line), line


def _from_json(line: bytes) -> dict[str, Any] | Reason:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError:
        return BROKEN_UTF8
    except (ValueError, RecursionError) as error:
        return Reason("malformed_json", bad=True, detail=str(error))
    return record if isinstance(record, dict) else Reason("not_a_json_object", bad=True)


def _checked(value: Any) -> str | Reason:
    """A value that claims to be text, as text."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return BROKEN_UTF8
    if not isinstance(value, str):
        return Reason("text_not_a_string", bad=True)
    try:
        value.encode()
    except UnicodeEncodeError:
        return Reason("lone_surrogate", bad=True)  # JSON can write half of a UTF-16 pair: "\\ud83d"
    return value


def _with_raw(outcome: str | Reason, raw: Any) -> _Outcome:
    if isinstance(outcome, str):
        return outcome, ""
    content = raw if isinstance(raw, bytes) else str(raw).encode(errors="backslashreplace")
    return outcome, content.decode(errors="backslashreplace")


def _blocks(file: Any, name: str) -> Iterator[bytes]:
    """The file's bytes, decompressed by its ending. Raises EOFError where the compressed stream is cut off."""
    if name.endswith(".zst"):
        yield from _zstandard_blocks(file)
        return
    stream = gzip.GzipFile(fileobj=file) if name.endswith(".gz") else file
    while block := stream.read(BLOCK):
        yield block


def _zstandard_blocks(file: Any) -> Iterator[bytes]:
    """Like zstandard's `stream_reader` over all frames, which however takes a cut-off file for its end."""
    zstandard = _optional("zstandard", ".zst files")
    frame = None
    while block := file.read(BLOCK):
        while block:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            try:
                yield frame.decompress(block)
            except zstandard.ZstdError as error:
                raise EOFError(str(error)) from error
            block = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame:
        raise EOFError("the last zstandard frame is not complete")


def _lines(blocks: Iterable[bytes], max_bytes: int) -> Iterator[bytes | None]:
    """Lines without their line feed; None for one of more than `max_bytes`, which is never held whole."""
    begun, skipping = b"", False
    for block in blocks:
        *whole, begun = (begun + block).split(b"\n")
        for line in whole:
            yield None if skipping or len(line) > max_bytes else line
            skipping = False
        if len(begun) > max_bytes:
            begun, skipping = b"", True
    if begun or skipping:
        yield None if skipping else begun


def _whole_file(path: epath.Path, text_field: str, max_bytes: int) -> Iterator[tuple[int, _Outcome]]:
    """A text file is one document."""
    if path.stat().length > max_bytes:
        yield 1, (TOO_LARGE, "")
    else:
        content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
        yield 1, _with_raw(_checked(content), content)


def _parquet(path: epath.Path, text_field: str, max_bytes: int) -> Iterator[tuple[int, _Outcome]]:
    parquet, pyarrow = _optional("pyarrow.parquet", "Parquet files"), _optional("pyarrow", "Parquet files")
    with path.open("rb") as file:
        try:
            table = parquet.ParquetFile(file)
            names = table.schema_arrow.names
            if text_field not in names:
                raise UserError(f"{path}: has no column {text_field!r}{nearest(text_field, names)}; set text_field")
            kind = table.schema_arrow.field(text_field).type
            kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
            if not str(kind).endswith(("string", "binary")):
                raise UserError(f"{path}: the column {text_field!r} holds {kind}, not strings; set text_field")
            number = 0
            for batch in table.iter_batches(batch_size=256, columns=[text_field]):
                column = batch.column(0)
                if pyarrow.types.is_dictionary(column.type):
                    column = column.dictionary_decode()
                # As bytes, because pyarrow does not promise that its strings are UTF-8.
                for value in column.cast(pyarrow.large_binary()).to_pylist():
                    number += 1
                    too_large = value is not None and len(value) > max_bytes
                    yield number, (TOO_LARGE, "") if too_large else _with_raw(_checked(value), value)
        except pyarrow.lib.ArrowException as error:
            raise UserError(f"{path}: is not a whole Parquet file: {error}") from error


def _array_record_objects(path: epath.Path, max_bytes: int) -> Iterator[_Object]:
    """JSON objects in ArrayRecord, numbered from 0 as everywhere in that format."""
    module = _optional("array_record.python.array_record_module", "ArrayRecord files")
    try:
        reader = module.ArrayRecordReader(str(path))
        total = reader.num_records()
        for start in range(0, total, 256):
            batch = reader.read(list(range(start, min(start + 256, total))))
            for number, record in enumerate(batch, start):
                yield (number, TOO_LARGE, b"") if len(record) > max_bytes else (number, _from_json(record), record)
        reader.close()
    except RuntimeError as error:
        raise UserError(f"{path}: is not a whole ArrayRecord file: {error}") from error


def _array_record(path: epath.Path, text_field: str, max_bytes: int) -> Iterator[tuple[int, _Outcome]]:
    for number, value, raw in _array_record_objects(path, max_bytes):
        yield number, _with_raw(text_of(value, text_field), raw)


READERS: dict[str, _Reader] = {
    "jsonl": _jsonl,
    "text": _whole_file,
    "markdown": _whole_file,
    "parquet": _parquet,
    "array_record": _array_record,
}


def _parquet_objects(path: epath.Path, max_bytes: int) -> Iterator[_Object]:
    """Rows as objects; a row of more than `max_bytes` is read with its group all the same, and then passed over."""
    parquet, pyarrow = _optional("pyarrow.parquet", "Parquet files"), _optional("pyarrow", "Parquet files")
    with path.open("rb") as file:
        try:
            number = 0
            for batch in parquet.ParquetFile(file).iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    given = {key: value for key, value in row.items() if value is not None}
                    yield number, TOO_LARGE if len(str(given)) > max_bytes else given, b""
        except (pyarrow.lib.ArrowException, UnicodeDecodeError) as error:
            raise UserError(f"{path}: is not a whole Parquet file: {error}") from error


OBJECT_READERS: dict[_Reader, Callable[[epath.Path, int], Iterator[_Object]]] = {
    _jsonl: _jsonl_objects,
    _array_record: _array_record_objects,
    _parquet: _parquet_objects,
}


def _tfds_builder(source: Source) -> Any:
    tfds = _optional("tensorflow_datasets", "TFDS datasets")
    try:
        return tfds.builder(source.path, data_dir=source.tfds_folder or None)
    except (ValueError, OSError, ImportError) as error:
        raise UserError(f"sources.{source.name}.path: {str(error).splitlines()[0]}") from error


def _tfds_records(source: Source) -> tuple[Any, Any]:
    """(builder, records by random access) of a prepared TFDS dataset, without TensorFlow."""
    builder = _tfds_builder(source)
    try:
        return builder, builder.as_data_source(split=source.tfds_split)
    except (ValueError, OSError, RuntimeError, AssertionError) as error:
        where = f"sources.{source.name}: {builder.info.full_name}"
        advice = "it must be prepared with file_format='array_record'"
        raise UserError(f"{where}: {str(error).splitlines()[0]}; {advice}") from error


def _tfds(source: SourceConfig) -> Iterator[tuple[str, str | Reason, str]]:
    builder, records = _tfds_records(source)
    if source.text_field not in builder.info.features:
        known = nearest(source.text_field, builder.info.features)
        where = f"sources.{source.name}.text_field: {builder.info.full_name}"
        raise UserError(f"{where} has no {source.text_field!r}{known}")
    for number in range(len(records)):
        value = records[number][source.text_field]
        yield f"{builder.info.full_name}:{number}", *_with_raw(_checked(value), value)


def _optional(module: str, purpose: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{purpose} need {module.partition('.')[0]}: pip install -e '.[data]' ({error})") from error
