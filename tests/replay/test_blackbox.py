"""A bad step is kept whole, can be taken again, and its document left out; the run is as if nobody had looked."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.base.errors import ConfigError, Refused
from jaxlm.data.config import MixtureSource, PackConfig
from jaxlm.data.loader import RowSource
from jaxlm.data.rows import decode
from jaxlm.model.config import ModelConfig
from jaxlm.replay.nonfinite import first_nonfinite
from jaxlm.stages import pack, prepare, pretrain, tokenizer
from jaxlm.stages.config import PretrainConfig
from jaxlm.text.config import PrepareConfig, SourceConfig
from jaxlm.tokenizer.config import TokenizerConfig
from jaxlm.tokenizer.tokenizer import load
from jaxlm.train import losses, step_folder
from jaxlm.train.config import CheckpointConfig, LoopConfig, OptimizerConfig, ScheduleConfig


def tool(name: str):
    path = Path(__file__).parent.parent.parent / f"tools/{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> str:
    root = tmp_path_factory.mktemp("rows")
    draw = np.random.default_rng(0)
    words = "the a small large red blue cat dog bird sees hears follows finds house river tree".split()
    texts = [" ".join(draw.choice(words, draw.integers(5, 12))) for _ in range(320)]
    texts[57] += " ~"  # the document over which the loss is not a number
    (root / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = SourceConfig(name="train", path=f"{root}/train.jsonl")
    prepare.main(PrepareConfig(sources=(source,), workdir=f"{root}/prepare"))
    tokenizer.main(TokenizerConfig(documents=f"{root}/prepare", kind="byte", workdir=f"{root}/tokenizer"))
    made_from = {"documents": f"{root}/prepare", "tokenizer": f"{root}/tokenizer"}
    pack.main(PackConfig(**made_from, row_length=128, workdir=f"{root}/pack"))
    return f"{root}/pack"


@pytest.fixture
def config(rows, tmp_path, monkeypatch) -> PretrainConfig:
    """14 steps are about one epoch of some 110 rows; the document comes once in each."""
    (bad_id,) = load(f"{rows}/tokenizer").encode("~")
    real = losses.row_sums

    def poisoned(params, batch, definition, chunk_tokens=0):
        sums = real(params, batch, definition, chunk_tokens)
        met = jnp.any(batch["ids"] == bad_id)
        return sums._replace(loss=sums.loss * jnp.sqrt(jnp.where(met, -1.0, 1.0)))

    monkeypatch.setattr(losses, "row_sums", poisoned)
    return PretrainConfig(
        workdir=str(tmp_path / "run"),
        data=(MixtureSource(path=rows, name="docs"),),
        model=ModelConfig(vocab_size=288, layers=1, width=16, heads=2, compute="float32"),
        batch_rows=8,
        steps=14,
        schedule=ScheduleConfig(peak=1e-2, warmup_steps=2),
        loop=LoopConfig(log_every_steps=3, checkpoint=CheckpointConfig(every_steps=7)),
    )


def lines(workdir) -> list[dict]:
    return [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]


def trained(workdir) -> list[dict]:
    timed = ("time", "train/tokens_per_second", "train/mfu", "train/data_wait", "train/goodput")
    return [
        {name: value for name, value in line.items() if name not in timed and not name.endswith("_seconds")}
        for line in lines(workdir)
    ]


def checksums(workdir, step: int) -> dict:
    arrays = step_folder.read(Path_(workdir) / "checkpoints" / str(step)).arrays
    return {path: array["checksum"] for path, array in arrays.items() if path != "halt"}


def Path_(path):  # noqa: N802
    from etils import epath

    return epath.Path(path)


def poisoned_document(config) -> int:
    """Its number among those that were kept."""
    source = RowSource(config.data[0].path, "train")
    (bad_id,) = load(f"{config.data[0].path}/tokenizer").encode("~")
    found = [piece.document for n in range(len(source)) for piece in decode(source._reader[n]) if bad_id in piece.ids]
    assert len(found) == 1
    return found[0]


def with_loop(config, **fields):
    return dataclasses.replace(config, loop=dataclasses.replace(config.loop, **fields))


@pytest.mark.slow
def test_a_bad_step_is_kept_replayed_and_its_document_left_out(config, tmp_path, capsys):
    pretrain.main(config)
    folder = Path(config.workdir) / "blackbox"
    kept = sorted(int(path.name) for path in folder.iterdir())
    assert kept, "no batch had the document"
    assert lines(config.workdir)[-1]["train/skipped_steps"] == len(kept)
    assert [line["step"] for line in lines(config.workdir)] == [3, 6, 9, 12, 14]
    step = kept[0]
    record = json.loads((folder / str(step) / "record.json").read_text())
    assert record["repeated"]
    poisoned = poisoned_document(config)
    assert poisoned in {document for row in record["rows"] for document in row["documents"]}
    assert record["metrics"]["train/loss"] == "nan"
    assert "train/gradient_norm/embedding" in record["metrics"]

    # The same run without black boxes, which never stands still: the same bits, the same lines.
    plain = dataclasses.replace(with_loop(config, black_boxes=0), workdir=str(tmp_path / "plain"))
    pretrain.main(plain)
    assert checksums(plain.workdir, 14) == checksums(config.workdir, 14)
    assert str(trained(plain.workdir)) == str(trained(config.workdir))
    assert not (tmp_path / "plain/blackbox").exists()

    # On one device, by the tool.
    replay = tool("replay")
    capsys.readouterr()
    assert replay.main([config.workdir, str(step)]) == 0
    said = capsys.readouterr().out
    assert f"step {step}, again on cpu: bad" in said
    assert "first nan: sqrt in poisoned (" in said
    assert f"documents {', '.join(map(str, record['rows'][0]['documents']))}" in said
    assert replay.main([config.workdir, "999"]) == 2

    # Left out, the same rows are no bad step, in another run and in one that goes on.
    source = dataclasses.replace(config.data[0], exclude=(f"document:{poisoned}",))
    without = dataclasses.replace(config, data=(source,), workdir=str(tmp_path / "without"))
    pretrain.main(without)
    assert lines(without.workdir)[-1]["train/skipped_steps"] == 0
    before = [line["train/loss"] for line in lines(config.workdir) if line["step"] < step]
    assert [line["train/loss"] for line in lines(without.workdir)][: len(before)] == before
    stopped = dataclasses.replace(with_loop(config, stop_at_step=step - 1), workdir=str(tmp_path / "goes-on"))
    pretrain.main(stopped)
    pretrain.main(dataclasses.replace(with_loop(stopped, stop_at_step=0), data=(source,)))
    assert checksums(stopped.workdir, 14) == checksums(without.workdir, 14)


def test_a_run_of_bad_steps_alone_ends_with_3_and_keeps_the_first(config, monkeypatch):
    monkeypatch.setattr(losses, "row_sums", lambda *a, real=losses.row_sums: _nan(real(*a)))
    loop = with_loop(config, max_skipped_steps=5, log_every_steps=1, black_boxes=2)
    with pytest.raises(Refused, match="the last 5 steps up to step 5 were all skipped") as refused:
        pretrain.main(loop)
    assert refused.value.exit_code == 3
    assert sorted(path.name for path in (Path(config.workdir) / "blackbox").iterdir()) == ["1", "2"]


def _nan(sums):
    return sums._replace(loss=sums.loss * jnp.nan)


def test_what_cannot_be_excluded_is_refused(rows, config):
    with pytest.raises(ConfigError, match="exclude: got page:3; row:NUMBER or document:NUMBER is needed"):
        MixtureSource(path=rows, exclude=("row:1", "page:3"))
    source = dataclasses.replace(config.data[0], exclude=("row:100000",))
    with pytest.raises(ConfigError, match=r"exclude: row:100000: .* has the rows 0 to"):
        pretrain.main(dataclasses.replace(config, data=(source,)))


def test_the_first_nan_is_found_in_a_scan_and_an_infinity_written_down_is_none():
    def function(x):
        masked = jnp.where(x > 0, x, -jnp.inf)
        weights = jax.nn.softmax(masked)

        @jax.checkpoint
        def turn(carry, y):
            return carry + jnp.log(y - 2.0), y

        return jax.lax.scan(turn, jnp.sum(weights), jnp.array([5.0, 4.0, 1.0]))[0]

    found = first_nonfinite(jax.jit(function), jnp.array([1.0, 2.0]))
    assert {*found} == {"nan"}
    assert "log in turn" in found["nan"]
    assert ", of -1 to -1" in found["nan"]
    assert "turn 2 of 3" in found["nan"]
    assert first_nonfinite(jax.jit(function), jnp.array([-1.0, 2.0]))["nan"] == found["nan"]
    assert first_nonfinite(lambda x: 1.0 / x, jnp.array([0.0]))["inf"].startswith("div in ")


@pytest.mark.slow
def test_spikes_halt_and_resume_to_the_bit(config, tmp_path):
    """The statistics of spikes lie in the state: a stopped run judges every step as one that never stopped."""
    rule = OptimizerConfig(spike_limit=2.0, spike_window=3)
    config = dataclasses.replace(config, optimizer=rule)
    pretrain.main(config)
    skipped = lines(config.workdir)[-1]["train/skipped_steps"]
    assert skipped > len([1 for line in lines(config.workdir) if line["train/loss"] is None])
    stopped = dataclasses.replace(with_loop(config, stop_at_step=7), workdir=str(tmp_path / "stopped"))
    pretrain.main(stopped)
    pretrain.main(with_loop(stopped, stop_at_step=0))
    assert checksums(stopped.workdir, 14) == checksums(config.workdir, 14)
    assert str(trained(stopped.workdir)) == str(trained(config.workdir))
