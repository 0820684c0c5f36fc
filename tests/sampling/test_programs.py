"""Programs on disk: a second pipeline traces nothing, and nothing stale or damaged is run."""

import logging

import jax
import numpy as np
import pytest

from ldm_jax.sampling import programs
from ldm_jax.sampling.pipeline import load
from ldm_jax.sampling.programs import ProgramStore

pytestmark = pytest.mark.compile

REQUEST = {"prompts": "red apple", "steps": 2, "seeds": [3]}
TRACED = "/jax/core/compile/jaxpr_trace_duration"


@pytest.fixture
def traces():
    seen = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == TRACED:
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="module")
def folder(tiny_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "programs"
    load(tiny_dir, devices=1, programs=path).warmup(**REQUEST)
    return path


def test_another_pipeline_makes_its_first_picture_without_tracing(
    folder, tiny_dir, pipe, traces, caplog
):
    (file,) = folder.glob("*.program")
    jax.clear_caches()
    again = load(tiny_dir, devices=1, programs=folder)
    made = again(**REQUEST)
    assert traces == []
    assert not [record for record in caplog.records if record.name.startswith("ldm_jax")]
    assert list(folder.glob("*.program")) == [file]
    np.testing.assert_array_equal(made, pipe(**REQUEST))
    jax.jit(lambda x: x + 1)(1.0)
    assert traces  # the fixture sees what is traced


def test_a_damaged_program_is_compiled_again(folder, tiny_dir, pipe, caplog):
    (file,) = folder.glob("*.program")
    whole = file.read_bytes()
    for damaged in (b"", whole[:-1], whole[:100] + b"\0" + whole[101:]):
        file.write_bytes(damaged)
        with caplog.at_level(logging.WARNING):
            made = load(tiny_dir, devices=1, programs=folder)(**REQUEST)
        np.testing.assert_array_equal(made, pipe(**REQUEST))
        assert "is damaged" in caplog.text
        caplog.clear()
    assert len(file.read_bytes()) > len(whole) // 2


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("steps", {"steps": 3}),
        ("sampler", {"sampler": "euler"}),
        ("batch", {"seeds": [3, 4]}),
        ("guidance", {"guidance": 2.0}),
        ("seed", {"seeds": [7]}),
    ],
)
def test_names_follow_what_is_compiled_in(what, change, folder, tiny_dir, monkeypatch):
    names = []

    def get(self, program, arguments, result, *described):
        names.append(programs._name(arguments, described, jax.devices()[:1]))

    monkeypatch.setattr(ProgramStore, "get", get)
    loaded = load(tiny_dir, devices=1, programs=folder)
    loaded.warmup(**REQUEST)
    loaded.warmup(**(REQUEST | change))
    same = len(set(names)) == 1
    assert same == (what in ("guidance", "seed"))


def test_changed_source_is_another_program(monkeypatch):
    arguments = (jax.numpy.zeros(2),)
    before = programs._name(arguments, (), jax.devices()[:1])
    monkeypatch.setattr(programs, "_source", lambda: "changed")
    assert programs._name(arguments, (), jax.devices()[:1]) != before


def test_an_address_is_never_part_of_a_name():
    with pytest.raises(TypeError, match="repr"):
        programs._name((jax.numpy.zeros(2),), (object(),), jax.devices()[:1])


def test_the_oldest_programs_go_when_the_folder_is_full(tmp_path):
    import os

    store = ProgramStore(tmp_path, max_bytes=250)
    for i in range(4):
        store._write(tmp_path / f"{i}.program", bytes(68))
        os.utime(tmp_path / f"{i}.program", (i, i))
    assert sorted(p.stem for p in tmp_path.glob("*.program")) == ["2", "3"]


def test_a_full_disk_costs_only_the_copy(tiny_dir, tmp_path, pipe, monkeypatch, caplog):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ProgramStore, "_write", full)
    loaded = load(tiny_dir, devices=1, programs=tmp_path)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(loaded(**REQUEST), pipe(**REQUEST))
    assert "cannot be kept" in caplog.text
