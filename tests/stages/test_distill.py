"""Learning from a teacher in whole stages: devices, pieces, what is stored, resuming, what is refused."""

import dataclasses
import importlib
import json
import shutil
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stage_runs import lines_of, pretrained, written

from jaxlm.base import files
from jaxlm.base.config import MeshConfig
from jaxlm.base.errors import ConfigError, UserError
from jaxlm.base.metrics import values
from jaxlm.base.sharding import make_mesh, own_rows
from jaxlm.data.config import ChatSource, MixtureSource
from jaxlm.data.loader import Loader, RowSource
from jaxlm.distill import teaching
from jaxlm.distill.config import DistillConfig
from jaxlm.distill.stored import NAME, Asked, StoredTeacher, store
from jaxlm.hub.opened import hash_of, open_model
from jaxlm.model.config import LoRAConfig, ModelConfig
from jaxlm.stages import pretrain, sft
from jaxlm.stages.config import PretrainConfig, SFTConfig
from jaxlm.train.config import CheckpointConfig, LoopConfig, ScheduleConfig

GGUF = Path(__file__).parent.parent / "hub/fixtures/gguf/llama.gguf"


@pytest.fixture(scope="module")
def teacher(packed_rows, tmp_path_factory) -> str:
    return pretrained(packed_rows, tmp_path_factory.mktemp("teacher"), steps=20, layers=2)


@pytest.fixture
def config(packed_rows, teacher, tmp_path) -> PretrainConfig:
    return PretrainConfig(
        workdir=str(tmp_path / "student"),
        data=(MixtureSource(path=packed_rows),),
        model=ModelConfig(vocab_size=288, layers=1, width=16, heads=2, compute="float32"),
        batch_rows=8,
        steps=4,
        heldout_batches=1,
        schedule=ScheduleConfig(peak=1e-2, warmup_steps=1),
        distill=DistillConfig(teacher=teacher, weight=0.7, temperature=1.5),
        loop=LoopConfig(log_every_steps=1, evaluate_every_steps=4, checkpoint=CheckpointConfig(every_steps=2)),
    )


def steps(config: PretrainConfig, mesh: MeshConfig, count: int = 2):
    """(parameters, figures) of a few steps from the start."""
    devices = jax.devices() if mesh != MeshConfig() else jax.devices()[:1]
    made = make_mesh(mesh, devices)
    config = pretrain.complete(config)
    rows = [(source.path, 1.0) for source in config.data]
    own = own_rows(made, config.batch_rows)
    loader = Loader(rows, "train", global_batch=config.batch_rows, seed=config.seed, own=own)
    with jax.set_mesh(made):
        program = pretrain.build(config, made)
        state, figures = program.initialize(), []
        batches = pretrain.learnt_by(config, made).batches(loader, made)(0, ((0, loader.weights),))
        for _ in range(count):
            state, metrics = program.step(state, next(batches) | program.base())
            figures.append(values(metrics))
    return state, figures


def close(a, b, tolerance=1e-5):
    for name in ("train/loss", "train/divergence", "train/gradient_norm"):
        np.testing.assert_allclose([x[name] for x in a[1]], [x[name] for x in b[1]], rtol=tolerance, atol=tolerance)
    # AdamW divides by the root of tiny second moments.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-4), a[0].params, b[0].params)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [MeshConfig(data=8), MeshConfig(data=2, fsdp=2, tensor=2)], ids=str)
def test_eight_devices_and_pieces_are_one(config, mesh):
    one = steps(config, MeshConfig())
    close(one, steps(config, mesh))
    close(one, steps(dataclasses.replace(config, accumulate=4), MeshConfig()))
    close(one, steps(dataclasses.replace(config, loss_chunk_tokens=128), MeshConfig()))
    assert not any("teacher" in str(path) for path, _ in jax.tree_util.tree_leaves_with_path(one[0]))


def test_its_own_teacher_teaches_nothing(config, teacher):
    """A student that starts as the teacher: divergence 0, no gradient; the cross-entropy is as without a teacher."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    stage = dataclasses.replace(config, distill=DistillConfig(teacher=teacher, weight=1.0), row_length=64)
    learnt = teaching.objective_of(stage, open_model, mesh, 288, lambda: open_model(teacher).tokenizer().hash)
    theirs = learnt.base()["teacher"]
    batch = {
        k: jnp.asarray(v)
        for k, v in Loader([(config.data[0].path, 1.0)], "train", global_batch=4, seed=0).batch(0).items()
    }
    sums = lambda p: learnt.row_sums(p, batch, theirs, learnt.definition, 0)
    total, gradient = jax.jit(jax.value_and_grad(lambda p: learnt.total(sums(p))))(theirs)
    np.testing.assert_allclose(total, 0.0, atol=1e-4)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient)) < 1e-4


def stored(config: PretrainConfig, folder: Path, k: int) -> PretrainConfig:
    distill = config.distill
    assert distill is not None
    asked = Asked(top_k=k, temperature=distill.temperature)
    directory, of = open_model(distill.teacher), hash_of(distill.teacher)
    for source in config.data:
        store(folder, source.path, directory, of, asked, make_mesh(MeshConfig(data=8)), batch_rows=16, chunk_tokens=256)
    return dataclasses.replace(config, distill=dataclasses.replace(distill, teacher="", stored=str(folder)))


@pytest.mark.slow
def test_stored_is_as_live(config, tmp_path, monkeypatch):
    live = dataclasses.replace(config, distill=dataclasses.replace(config.distill, top_k=6))
    kept = stored(config, tmp_path / "kept", 6)
    close(steps(live, MeshConfig()), steps(kept, MeshConfig()))
    close(steps(live, MeshConfig()), steps(kept, MeshConfig(data=4, fsdp=2)))
    # The tool stores the same.
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent.parent / "tools"))
    given = {"teacher": live.distill.teacher, "rows": config.data[0].path, "output": tmp_path / "tool"}
    given |= {"top_k": 6, "temperature": 1.5, "chunk_tokens": 256}
    tool = importlib.import_module("store_teacher")
    assert tool.main([f"--{name}={value}" for name, value in given.items()]) == 0
    source = RowSource(config.data[0].path, "train")
    both = [
        StoredTeacher(DistillConfig(stored=str(tmp_path / n), temperature=1.5)).of(source) for n in ("kept", "tool")
    ]
    for row in (0, len(source) - 1):
        np.testing.assert_array_equal(both[0][row][0], both[1][row][0])
        np.testing.assert_allclose(both[0][row][1], both[1][row][1], atol=1e-5)
    assert tool.main(["--teacher=/nowhere", f"--rows={config.data[0].path}", f"--output={tmp_path}/tool"]) == 2
    pretrain.main(kept)
    assert [line["step"] for line in lines_of(kept.workdir) if "train/divergence" in line] == [1, 2, 3, 4]

    with pytest.raises(ConfigError, match="temperature: is 1.0; what is stored was made for 1.5"):
        StoredTeacher(dataclasses.replace(kept.distill, temperature=1.0))
    with pytest.raises(ConfigError, match="top_k: is 3; 6 are stored"):
        StoredTeacher(dataclasses.replace(kept.distill, top_k=3))
    with pytest.raises(UserError, match="holds nothing; run tools/store_teacher.py"):
        StoredTeacher(dataclasses.replace(kept.distill, stored=str(tmp_path / "none")))
    (folder,) = (tmp_path / "kept").iterdir()
    content = bytearray((folder / NAME).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / NAME).write_bytes(content)
    again = dataclasses.replace(kept, workdir=str(tmp_path / "again"))
    with pytest.raises(UserError, match="teacher.arrayrecord"):
        pretrain.main(again)


@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_for_bit(config, teacher, tmp_path):
    whole = dataclasses.replace(config, workdir=str(tmp_path / "whole"))
    pretrain.main(whole)
    pretrain.main(dataclasses.replace(config, loop=dataclasses.replace(config.loop, stop_at_step=2)))
    other = pretrained(config.data[0].path, tmp_path / "other", steps=2, layers=1)
    with pytest.raises(UserError, match="input 1|another"):  # the rows are input 0
        pretrain.main(dataclasses.replace(config, distill=dataclasses.replace(config.distill, teacher=other)))
    moved = shutil.copytree(teacher, tmp_path / "moved")  # its content counts, not its place
    pretrain.main(dataclasses.replace(config, distill=dataclasses.replace(config.distill, teacher=str(moved))))
    names = [name for name in files.walk(f"{whole.workdir}/model") if name.startswith("params/")]
    assert names
    for name in names:
        assert (Path(whole.workdir) / "model" / name).read_bytes() == (
            Path(config.workdir) / "model" / name
        ).read_bytes()
    a, b = (
        [{k: v for k, v in line.items() if k in ("step", "train/loss", "train/divergence")} for line in lines_of(w)]
        for w in (whole.workdir, config.workdir)
    )
    assert [line for line in a if "train/loss" in line] == [line for line in b if "train/loss" in line]


@pytest.mark.slow
def test_instruction_tuning_with_adapters(teacher, packed_rows, tmp_path):
    """The frozen base and the teacher in one batch."""
    chats = [{"prompt": f"{n}?", "completion": str(n + 1)} for n in range(40)]
    config = SFTConfig(
        workdir=str(tmp_path / "sft"),
        model=pretrained(packed_rows, tmp_path / "base", steps=2, layers=1),
        sources=(ChatSource(name="train", path=written(tmp_path / "train.jsonl", chats)),),
        row_length=64,
        batch_rows=16,
        accumulate=2,
        steps=24,
        lora=LoRAConfig(rank=2),
        schedule=ScheduleConfig(peak=1e-2, warmup_steps=1),
        distill=DistillConfig(teacher=teacher, divergence="jensen_shannon", weight=1.0),
        loop=LoopConfig(log_every_steps=1),
    )
    sft.main(config)
    figures = [line["train/divergence"] for line in lines_of(config.workdir) if "train/divergence" in line]
    assert len(figures) == 24
    assert sum(figures[-6:]) < sum(figures[:6])


def test_teachers_of_other_formats_and_other_tokens():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    config, own = DistillConfig(teacher=str(GGUF)), open_model(GGUF).tokenizer().hash
    stage = lambda config: types.SimpleNamespace(distill=config, row_length=32)
    make = lambda vocab_size, config=config, hash=own: teaching.objective_of(
        stage(config), open_model, mesh, vocab_size, lambda: hash
    )
    size = open_model(GGUF).config.vocab_size
    assert make(vocab_size=size).base()["teacher"]["embedding"].shape == (size, 32)
    with pytest.raises(UserError, match=f"another tokenizer \\({own[:12]}\\) than the rows \\(0123456789ab\\)"):
        make(hash="0123456789abcdef", vocab_size=size)
    with pytest.raises(ConfigError, match=f"model.vocab_size: is 7, but the teacher .* has {size} rows"):
        make(vocab_size=7)
    with pytest.raises(ConfigError, match="distill.top_k: 1000 is all of"):
        make(config=dataclasses.replace(config, top_k=1000), vocab_size=size)
    with pytest.raises(ConfigError, match="distill.teacher: is empty; give a model"):
        teaching.inputs(DistillConfig(), hash_of)
    assert teaching.inputs(config, hash_of) == {str(GGUF): files.sha256(GGUF)}
    assert json.dumps(teaching.inputs(None, hash_of)) == "{}"
