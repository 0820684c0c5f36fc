"""What the page runs, without the page: previews, files, and how to repeat them."""

import dataclasses
import shlex
import threading

import numpy as np
import pytest
from absl import flags as absl_flags
from PIL import Image

from ldm_jax.app.recipes import advanced, command_line, python, text_of
from ldm_jax.app.studio import Flags, Studio
from ldm_jax.cli import sample
from ldm_jax.errors import RequestError
from ldm_jax.io.png import read_settings
from ldm_jax.sampling.request import KINDS, OPTIONS

FLAGS = {"prompt": ["red apple", 'it\'s a "boat"'], "num": 2, "seed": 2**40, "guidance": "2,3"}


@pytest.fixture
def studio(pipe, tmp_path):
    return Studio(pipe, {"model": "tiny", "vae": None}, tmp_path / "out")


@pytest.mark.compile
def test_a_run_shows_predictions_and_writes_pictures_that_replay(studio):
    frames = list(studio.run({"prompt": ["red apple"], "num": 3, "seed": 7}))
    assert [frame.done for frame in frames[:-1]] == pytest.approx([0.25, 0.5, 0.75, 1])
    assert [len(frame.paths) for frame in frames] == [0, 0, 0, 3, 3]
    assert np.abs(frames[0].images[0].astype(int) - frames[3].images[0]).max() > 2
    (grid,) = frames[-1].extra
    assert grid.name == "00003-grid.png"
    for i, path in enumerate(frames[-1].paths):
        assert (read_settings(path)["seed"], read_settings(path)["model"]) == (7 + i, "tiny")
        _, request = sample.replayed(str(path))
        (again,) = studio.pipe.batches(request)
        written = np.asarray(Image.open(path)).astype(int)
        np.testing.assert_allclose(again.images[0].astype(int), written, atol=1)


@pytest.mark.compile
def test_two_runs_at_once_do_not_mix(studio):
    runs = [studio.run({"prompt": [text], "num": 1, "seed": 0}) for text in ("red", "blue")]
    found = [[], []]
    threads = [
        threading.Thread(target=lambda k=k: found[k].extend(runs[k])) for k in range(len(runs))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    names = sorted(run[-1].paths[0].name for run in found)
    assert [name[:6] for name in names] == ["00000-", "00001-"]
    assert {read_settings(run[-1].paths[0])["prompt"] for run in found} == {"red", "blue"}


@pytest.mark.fast
def test_the_command_line_and_the_program_make_the_same_request(studio, monkeypatch):
    (request,) = studio.requests(FLAGS)
    values = absl_flags.FlagValues()
    monkeypatch.setattr(sample.flags, "FLAGS", values)
    monkeypatch.setattr(absl_flags, "FLAGS", values)
    for name in ("string", "multi_string", "integer", "bool", "enum"):
        define = getattr(absl_flags, f"DEFINE_{name}")
        monkeypatch.setattr(
            sample.flags,
            f"DEFINE_{name}",
            lambda *a, define=define, **k: define(*a, **k, flag_values=values),
        )
    sample.define_flags()
    values(shlex.split(command_line(studio.model, FLAGS).replace("\\\n", " ")))
    assert values.model == "tiny"
    (typed,) = sample.requests_of(values)
    assert dataclasses.replace(typed, batch=request.batch) == request

    calls = []

    class Package:
        @staticmethod
        def use_cores():
            pass

        @staticmethod
        def load(*args, **options):
            calls.append((args, options))
            return studio.pipe.complete.__self__ and (lambda **given: calls.append(given))

    text = python(studio.model, [request]).replace("import ldm_jax\n", "")
    exec(text, {"ldm_jax": Package})
    assert calls[0] == (("tiny",), {})
    made = dataclasses.replace(request, **calls[1])
    count = len(made.seeds)
    spread = {
        name: [value] * count if isinstance(value := getattr(made, name), str) else value
        for name in ("prompts", "negative")
    }
    assert dataclasses.replace(made, **spread) == request


@pytest.mark.fast
def test_every_setting_is_written_as_its_flag_reads_it():
    own = {"size": (64, 96), "guidance_interval": [1.0, 900.0], "eta": 0.5, "grid": [1.0, 500.0]}
    for name, value in own.items():
        kind = OPTIONS[name].metadata["kind"]
        assert list(np.ravel(KINDS[kind].parse(text_of(value, kind)))) == list(np.ravel(value))
    assert {"eta", "grid", "size", "batch", "cache_interval"} <= {*advanced()}
    assert not {"steps", "image", "prompts", "toward"} & {*advanced()}


@pytest.mark.fast
def test_too_many_pictures_are_refused(studio):
    with pytest.raises(RequestError, match="80 pictures at once: the page makes at most 64"):
        studio.requests({"prompt": ["a"] * 5, "num": 16, "seed": 0})
    assert Flags(steps="3").steps == "3"
    assert Flags().steps is None


@pytest.mark.fast
def test_only_kept_inputs_are_read_from_a_pictures_settings(studio, tmp_path):
    kept = studio.keep(b"picture", ".png")
    assert studio.keep(b"picture", ".png") == kept
    assert studio.kept(kept) == kept
    (tmp_path / "secret.png").write_bytes(b"x")
    for path in (str(tmp_path / "secret.png"), "/etc/passwd", f"{kept}/../../../secret.png",
                 "\0", 3, None, [kept]):  # fmt: skip
        assert studio.kept(path) is None
