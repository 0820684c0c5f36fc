"""The command lines of train.py and sample.py: output files, and one line per mistake."""

import json
import shutil

import jax
import numpy as np
import pytest
from conftest import ROOT, TINY, child
from PIL import Image

from ldm_jax.cli.sample import REPLAYED
from ldm_jax.io.checkpoint import load_model, save_model
from ldm_jax.io.png import read_settings, save_png

pytestmark = pytest.mark.compile

PARTS = ("first_stage", "conditioner")
ADVERSARY = ["--config.adversary.weight=0.5"]
CONFIG = f"--config={ROOT / 'configs' / 'emoji_kl.py'}:smoke"


def pixels(path):
    return np.asarray(Image.open(path))


# ---------------------------------------------------------------------------------------- sample.py


@pytest.fixture
def sample(script, tiny_dir, tmp_path):
    """Runs sample.py with the tiny model into tmp_path/"out"."""

    def run(*argv, model=tiny_dir, out=tmp_path / "out"):
        return script("sample.py", f"--model={model}", f"--out={out}", *argv)

    return run


def test_pictures_are_written_with_their_settings_numbered_on_and_made_again(
    sample, tiny_dir, tmp_path
):
    out = tmp_path / "out"
    noise = ["--eta=1", "--temperature=0.5"]
    ran = sample("--prompt=red apple", "--num=2", "--seed=5", "--guidance=2", "--steps=3", *noise)
    assert ran.status == 0
    first = ["00000-grid.png", "00000-red-apple-5.png", "00001-red-apple-6.png"]
    assert sorted(path.name for path in out.iterdir()) == first
    settings = read_settings(out / first[2])
    expected = {"prompt": "red apple", "seed": 6, "steps": 3, "guidance": 2.0, "sampler": "ddim"}
    expected |= {"eta": 1.0, "temperature": 0.5}
    assert {k: settings[k] for k in expected} == expected
    assert settings["model"] == str(tiny_dir)
    assert Image.open(out / first[2]).text["prompt"] == "red apple"
    assert read_settings(out / first[0])["prompts"] == ["red apple"]
    sheet = pixels(out / first[0])
    assert (sheet[2:18, 2:18] == pixels(out / first[1])).all()
    assert (sheet[2:18, 20:36] == pixels(out / first[2])).all()

    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert sample(f"--replay={out / first[2]}").status == 0
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.name in before} == before
    (again,) = {path.name for path in out.iterdir()} - set(before)
    assert again == "00002-red-apple-6.png"
    assert (pixels(out / again) == pixels(out / first[2])).all()
    assert read_settings(out / again) == settings


def test_options_of_a_sampler_are_kept_and_replayed(sample, tmp_path):
    given = ["--sampler=euler", "--sampler_options=churn=2,s_noise=1.1", "--steps=3"]
    assert sample("--prompt=red apple", "--num=1", *given).status == 0
    (file,) = (tmp_path / "out").glob("*.png")
    assert read_settings(file)["sampler_options"] == {"churn": 2.0, "s_noise": 1.1}
    assert sample(f"--replay={file}", out=tmp_path / "again").status == 0
    (again,) = (tmp_path / "again").glob("*.png")
    assert (pixels(again) == pixels(file)).all()


def test_parts_are_taken_from_other_models_and_kept(sample, tiny_dir, tmp_path):
    config, params = load_model(tiny_dir)
    other = jax.tree.map(lambda a: 0.5 * a, params)
    save_model(tmp_path / "vae", config, {**params, "first_stage": other["first_stage"]})
    save_model(tmp_path / "text", config, {**params, "conditioner": other["conditioner"]})
    save_model(tmp_path / "both", config, {**params, **{k: other[k] for k in PARTS}})
    parts = [f"--vae={tmp_path / 'vae'}", f"--text_encoder={tmp_path / 'text'}"]
    given = ["--prompt=red apple", "--num=1", "--steps=2"]
    assert sample(*given, *parts).status == 0
    assert sample(*given, model=tmp_path / "both", out=tmp_path / "whole").status == 0
    assert sample(*given, out=tmp_path / "plain").status == 0
    (file,), (whole,), (plain,) = (
        list((tmp_path / name).glob("*.png")) for name in ("out", "whole", "plain")
    )
    assert (pixels(file) == pixels(whole)).all()
    assert (pixels(file) != pixels(plain)).any()
    assert read_settings(file)["vae"] == str(tmp_path / "vae")
    assert sample(f"--replay={file}", out=tmp_path / "again").status == 0
    (again,) = (tmp_path / "again").glob("*.png")
    assert (pixels(again) == pixels(file)).all()


def test_a_file_of_prompts_makes_a_picture_of_each(sample, tmp_path):
    (tmp_path / "prompts.txt").write_text("red apple\n\n  blue boat \n", encoding="utf-8")
    ran = sample(
        f"--prompts_file={tmp_path / 'prompts.txt'}",
        "--num=1",
        "--steps=3",
        "--nogrid",
        "--sampler=ddpm",
    )
    assert ran.status == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "00000-red-apple-0.png",
        "00001-blue-boat-0.png",
    ]


def test_the_planned_output_is_logged_after_the_request_is_validated(sample):
    good, bad = (
        sample("--prompt=red apple", "--num=1", "--steps=3"),
        sample("--prompt=red apple", "--steps=0"),
    )
    assert good.lines[0].startswith("sampling 1 pictures, 3 steps of ddim")
    assert len(good.lines) == 2
    assert "00000-red-apple-0.png" in good.lines[1]
    assert "sampling" not in bad.stderr


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prompt=x", "--size=16x18"], "size 16x18: height and width must be multiples of 4"),
        (["--prompt=x", "--size=16"], "--size=16: write HEIGHTxWIDTH, for example 64x96"),
        (["--prompt=x", "--steps=0"], "steps must be from 1 to 100, not 0"),
        (["--prompt=x", "--steps=101"], "steps must be from 1 to 100, not 101"),
        (["--prompt=x", "--steps=many"], "--steps=many: write whole numbers, separated by commas"),
        (["--prompt=x", "--guidance=1,x"], "--guidance=1,x: write numbers, separated by commas"),
        (["--prompt=x", "--mask={tmp}/foreign.png"], "mask needs an image: give one"),
        (
            ["--prompt=x", "--image={tmp}/foreign.png", "--strength=1.5"],
            "strength must be above 0 and up to 1, not 1.5",
        ),
        (["--prompt=x", "--image={tmp}/empty.txt"], "empty.txt is no readable picture"),
        (["--class=cat"], "this model is conditioned on prompts, not classes"),
        (["--prompt=x", "--class=cat"], "give prompts or classes, not both"),
        (["--prompt=x", "--negative=y", "--negative=z"], "2 of --negative for 1 prompts"),
        (["--prompt=x", "--num=1", "--interpolate=3"], "interpolation needs at least two ends"),
        (
            ["--prompt=x", "--layout={tmp}/none.json"],
            "conditioned on prompts, not layout",
        ),
        (
            ["--prompt=x", "--format=npz", "--gif"],
            "--format takes prompts, classes or no condition",
        ),
        (
            ["--prompt=x", "--format=npz", "--out={tmp}"],
            "is not empty and holds no run of ours: give another --out",
        ),
        (["--replay={tmp}/moved.png"], "was made from the image {tmp}/none.png, which is missing"),
        (
            ["--replay={tmp}/changed.png"],
            "was made from the image {tmp}/foreign.png, which has changed since",
        ),
        (["--prompt=x", "--num=0"], "--num=0"),
        (["--prompt=x", "--cache_interval=0"], "cache_interval must be at least 1, not 0"),
        (["--prompt=x", "--sampler=dimm"], "sampler 'dimm' does not exist; did you mean 'ddim'?"),
        (["--prompt=x", "--sampler=ddpm", "--eta=0.5"], "the ddpm sampler has no eta"),
        (
            ["--prompt=x", "--dtype=float23"],
            "dtype 'float23' does not exist; did you mean 'float32'?",
        ),
        (["--prompt=x", f"--seed={2**64 - 1}", "--num=2"], "seeds must be from 0 to 1844674407"),
        (["--prompt=x", "--promt=y"], "unknown flag --promt; did you mean --prompt?"),
        (["--prompt=x", "y"], "unexpected argument 'y'; every setting is a --flag"),
        (
            ["--prompt=x", "--model=nowhere"],
            "model 'nowhere' is neither a path nor a model that ships with ldm_jax",
        ),
        ([], "conditioned on prompts: give at least one"),
        (["--prompts_file={tmp}/none.txt"], "none.txt cannot be read: No such file or directory"),
        (["--prompts_file={tmp}/empty.txt"], "empty.txt has no prompt in it"),
        (["--replay={tmp}/empty.txt"], "empty.txt is no readable picture"),
        (["--replay={tmp}/none.png"], "none.png cannot be read: No such file or directory"),
        (["--replay={tmp}/foreign.png"], "foreign.png was not made by ldm_jax"),
        (["--replay={tmp}/grid.png"], "grid.png: its settings lack 'model'"),
        (["--prompt=x", "--out={tmp}/empty.txt/below"], "empty.txt is not a folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_each_mistake_is_one_line_and_writes_nothing(sample, tmp_path, argv, message):
    (tmp_path / "empty.txt").write_text("\n\n")
    Image.new("RGB", (4, 4)).save(tmp_path / "foreign.png")
    save_png(tmp_path / "grid.png", np.zeros((4, 4, 3), np.uint8), {"prompts": ["x"]})
    kept = dict.fromkeys(REPLAYED, 1) | {"image_sha256": "0" * 64}
    for name, image in (("moved.png", "none.png"), ("changed.png", "foreign.png")):
        save_png(
            tmp_path / name, np.zeros((4, 4, 3), np.uint8), kept | {"image": str(tmp_path / image)}
        )
    before = sorted(tmp_path.rglob("*"))
    ran = sample(*(arg.format(tmp=tmp_path) for arg in argv))
    assert ran.status == 2
    assert len(ran.lines) == 1, ran.stderr
    assert ran.lines[0].startswith("sample.py: ")
    assert message.format(tmp=tmp_path) in ran.lines[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_task_is_made_again_from_its_picture(sample, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)).save(
        tmp_path / "photo.png"
    )
    task = [f"--image={tmp_path / 'photo.png'}", "--strength=0.5", "--negative=blue boat"]
    task += ["--cache_interval=2", "--cache_depth=2"]
    assert sample("--prompt=red apple", "--num=1", "--steps=4", *task).status == 0
    path = tmp_path / "out" / "00000-red-apple-0.png"
    kept = read_settings(path)
    assert kept["image"] == str(tmp_path / "photo.png")
    assert (kept["strength"], kept["negative"], kept["size"]) == (0.5, "blue boat", None)
    assert (kept["cache_interval"], kept["cache_depth"]) == (2, 2)
    assert pixels(path).shape == (16, 24, 3)
    assert sample(f"--replay={path}").status == 0
    again = tmp_path / "out" / "00001-red-apple-0.png"
    assert (pixels(again) == pixels(path)).all()
    assert read_settings(again) == kept


def test_embeddings_are_remembered_by_their_file(sample, tiny_dir, tmp_path):
    model, file = shutil.copytree(tiny_dir, tmp_path / "model"), tmp_path / "vectors.npy"
    saved = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(
        json.dumps(saved | {"conditioner": {"kind": "embeddings", "dim": 16}})
    )
    np.save(file, np.random.default_rng(0).standard_normal((3, 16)))
    assert sample(f"--embeddings={file}", "--num=1", "--steps=3", model=model).status == 0
    path, again = (tmp_path / "out" / f"0000{i}-picture-0.png" for i in range(2))
    assert read_settings(path)["embeddings"] == str(file)
    assert sample(f"--replay={path}").status == 0
    assert (pixels(again) == pixels(path)).all()
    np.save(file, np.zeros((3, 16)))
    ran = sample(f"--replay={path}")
    assert ran.status == 2
    assert "was made from the embeddings" in ran.lines[0]
    ran = sample(f"--embeddings={tmp_path / 'none.npy'}", model=model)
    assert (ran.status, len(ran.lines)) == (2, 1)
    assert "none.npy cannot be read: No such file or directory" in ran.lines[0]


def test_a_sweep_is_one_labelled_grid(sample, tmp_path):
    assert sample("--prompt=red apple", "--num=1", "--steps=3,4", "--guidance=1,3").status == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["00000-grid.png", *(f"{i:05d}-red-apple-0.png" for i in range(4))]
    kept = [read_settings(tmp_path / "out" / name) for name in names[1:]]
    assert [(one["steps"], one["guidance"]) for one in kept] == [
        (3, 1.0),
        (3, 3.0),
        (4, 1.0),
        (4, 3.0),
    ]
    sheet = read_settings(tmp_path / "out" / names[0])
    assert (sheet["steps"], sheet["guidance"]) == ([3, 4], [1.0, 3.0])
    assert sample(f"--replay={tmp_path / 'out' / names[4]}").status == 0
    assert (
        pixels(tmp_path / "out" / "00004-red-apple-0.png") == pixels(tmp_path / "out" / names[4])
    ).all()


def test_an_interpolation_is_pictures_and_an_animation(sample, tmp_path):
    ends = ["--prompt=red apple", "--prompt=blue boat", "--num=1"]
    assert sample(*ends, "--interpolate=2", "--steps=3", "--gif").status == 0
    out = tmp_path / "out"
    with Image.open(out / "00000-interpolation.gif") as film:
        assert (film.n_frames, film.size) == (3, (16, 16))
    kept = read_settings(out / "00001-red-apple-0.png")
    assert (kept["toward_prompt"], kept["toward_seed"], kept["mix"]) == ("blue boat", 0, 0.5)


def test_steps_are_shown_as_a_row_and_a_film(sample, tmp_path):
    assert (
        sample("--prompt=red apple", "--num=1", "--steps=3", "--progress_every=1", "--gif").status
        == 0
    )
    out = tmp_path / "out"
    assert pixels(out / "00000-red-apple-0.progress.png").shape == (20, 4 * 18 + 2, 3)
    with Image.open(out / "00000-red-apple-0.gif") as film:
        assert film.n_frames == 4


def test_many_pictures_go_into_one_file(sample, tmp_path):
    ran = sample(
        "--prompt=red apple",
        "--prompt=blue boat",
        "--num=5",
        "--batch=2",
        "--steps=3",
        "--format=npz",
    )
    assert ran.status == 0
    assert "5 of them made now" in ran.lines[-1]
    with np.load(tmp_path / "out" / "pictures.npz") as file:
        assert (file["arr_0"].shape, file["arr_0"].dtype, file.files) == (
            (5, 16, 16, 3),
            np.uint8,
            ["arr_0"],
        )


def kinds_of_files(tiny_dir):
    """One file of every kind in a model directory: (kind, path relative to the directory)."""
    params = tiny_dir / "params"
    kinds = {}
    for path in sorted(
        path for path in params.rglob("*") if path.is_file() and path.stat().st_size
    ):
        part = path.relative_to(params)
        kinds.setdefault(
            "/".join([*part.parts[:-1], part.name if part.parent.name != "d" else "*"]), part
        )
    return kinds


def test_a_damaged_model_is_one_line(sample, tiny_dir, tmp_path):
    kinds = kinds_of_files(tiny_dir)
    assert {"_METADATA", "manifest.ocdbt", "d/*"} <= set(kinds)
    harmless = []
    for kind, part in kinds.items():
        model = tmp_path / "model"
        shutil.rmtree(model, ignore_errors=True)
        shutil.copytree(tiny_dir, model)
        file = model / "params" / part
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        ran = sample("--prompt=x", "--steps=3", "--num=1", "--nogrid", model=model)
        if ran.status == 0:  # Orbax does not need it to read the arrays
            harmless.append(kind)
            continue
        assert ran.status == 2, kind
        assert len(ran.lines) == 1, (kind, ran.stderr)
        assert "cannot be read (damaged or incomplete?)" in ran.lines[0], (kind, ran.stderr)
    assert not {"_METADATA", "manifest.ocdbt", "d/*"} & set(harmless)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"format": 1, "kind"', "config.json is damaged"),
        ("\x00\xff", "config.json is damaged"),
        ("[]", "format None is not 1"),
        (json.dumps({"format": 2}), "format 2 is not 1; use a newer ldm_jax"),
        (
            json.dumps({"format": 1, "kind": "latent_diffusion"}),
            "the section 'conditioner' is missing",
        ),
        (
            json.dumps({"format": 1, **TINY, "unet": {**TINY["unet"], "model_channels": 64}}),
            "do not fit this config",
        ),
        (
            json.dumps({"format": 1, **{k: v for k, v in TINY.items() if k != "objective"}}),
            "'objective' is missing",
        ),
        (
            json.dumps({"format": 1, **TINY, "first_stage": None}),
            "'first_stage' is None, not a section of fields",
        ),
        (
            json.dumps({"format": 1, **TINY, "objective": "noise"}),
            "objective 'noise' does not exist",
        ),
        (None, "has no config.json"),
    ],
)
def test_a_garbled_model_config_is_one_line(sample, tiny_dir, tmp_path, config, message):
    shutil.copytree(tiny_dir, tmp_path / "model")
    if config is None:
        (tmp_path / "model" / "config.json").unlink()
    else:
        (tmp_path / "model" / "config.json").write_text(config, encoding="latin-1")
    ran = sample("--prompt=x", model=tmp_path / "model")
    assert ran.status == 2
    assert len(ran.lines) == 1, ran.stderr
    assert message in ran.lines[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.processes
def test_sample_py_runs_as_a_program(tiny_dir, tmp_path):
    process = child(
        "sample.py",
        f"--model={tiny_dir}",
        f"--out={tmp_path / 'out'}",
        "--prompt=red apple",
        "--num=1",
        "--steps=3",
    )
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert stdout == ""
    assert [line.split()[0] for line in stderr.splitlines()] == ["loading", "sampling", "1"], stderr
    assert (tmp_path / "out" / "00000-red-apple-0.png").exists()


# ----------------------------------------------------------------------------------------- train.py


@pytest.fixture
def folders(tmp_path):
    """Invalid files, one of each kind."""
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").write_text("precious")
    (tmp_path / "other_run").mkdir()
    (tmp_path / "other_run" / "config.json").write_text('{"task": "diffusion"}')
    (tmp_path / "garbled_run").mkdir()
    (tmp_path / "garbled_run" / "config.json").write_text('{"task"')
    (tmp_path / "corrupt.zip").write_bytes(b"PK\x03\x04 and no more")
    (tmp_path / "broken").mkdir()
    for i in range(8):
        (tmp_path / "broken" / f"{i}.png").write_bytes(b"no picture")
    return tmp_path


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([CONFIG, "--config.optim.lrr=1"], "config has no field 'optim.lrr'; did you mean 'lr'?"),
        ([CONFIG, "--config.optin.lr=1"], "config has no field 'optin.lr'; did you mean 'optim'?"),
        (
            [CONFIG, "--config.optim.lr=low"],
            "--config.optim.lr=low: could not convert string to float",
        ),
        ([CONFIG.replace("smoke", "smok")], "emoji_kl has no variant 'smok'; choose smoke"),
        (["--config={tmp}/none.py"], "none.py does not exist"),
        ([], "missing --config=..."),
        ([CONFIG, "--workdir="], "missing --workdir=..."),
        ([CONFIG, "--wokdir=x"], "unknown flag --wokdir; did you mean --workdir?"),
        (
            [CONFIG, "--config.task=autoencode"],
            "task 'autoencode' does not exist; did you mean 'autoencoder'?",
        ),
        (
            [CONFIG, "--config.dtype=float23"],
            "dtype 'float23' does not exist; did you mean 'float32'?",
        ),
        (
            [CONFIG, "--config.parallel=pamp"],
            "parallel 'pamp' does not exist; did you mean 'pmap'?",
        ),
        ([CONFIG, "--config.loss.kind=l3"], "loss.kind 'l3' does not exist"),
        ([CONFIG, "--config.updates=fuse"], "updates 'fuse' does not exist; did you mean 'fused'?"),
        (
            [CONFIG, "--config.loss.restart_codes=True"],
            "loss.restart_codes is for codebooks (vq, ema), not for kl",
        ),
        (
            [CONFIG, *ADVERSARY, "--config.adversary.loss=hing"],
            "adversary.loss 'hing' does not exist; did you mean 'hinge'?",
        ),
        (
            [CONFIG, *ADVERSARY, "--config.adversary.layers=9"],
            "adversary.layers 9 is too many for pictures of 64 pixels",
        ),
        ([CONFIG, "--config.optim.decay=cosin"], "optim.decay 'cosin' does not exist"),
        ([CONFIG, "--config.steps=0"], "steps must be at least 1, not 0"),
        ([CONFIG, "--config.optim.accumulate=0"], "optim.accumulate must be at least 1, not 0"),
        (
            [CONFIG, "--config.batch_size=12"],
            "batch_size 12 must be a multiple of 8: "
            "the mesh cuts it into 8, optim.accumulate into 1",
        ),
        (
            [CONFIG, "--config.data.path={tmp}/none.zip"],
            "none.zip does not exist: give the path of a folder or .zip",
        ),
        ([CONFIG, "--config.data.path={tmp}/corrupt.zip"], "corrupt.zip is not a zip archive"),
        ([CONFIG, "--config.data.split_column=colour"], "there is no column 'colour'"),
        (
            [CONFIG, "--workdir={tmp}/used"],
            "used is not empty and holds no training run: give another --workdir",
        ),
        (
            [CONFIG, "--workdir={tmp}/other_run"],
            "other_run holds a run with task='diffusion', not 'autoencoder' (and ",
        ),
        ([CONFIG, "--workdir={tmp}/garbled_run"], "config.json is damaged: give another --workdir"),
        ([CONFIG, "--workdir={tmp}/corrupt.zip/run"], "cannot be written: Not a directory"),
    ],
    ids=lambda value: " ".join(value).replace(CONFIG, "") if isinstance(value, list) else "",
)
def test_each_mistake_in_training_is_one_line_and_writes_nothing(script, folders, argv, message):
    before = {path: path.read_bytes() for path in sorted(folders.rglob("*")) if path.is_file()}
    argv = [arg.format(tmp=folders) for arg in argv]
    workdir = (
        [] if any(arg.startswith("--workdir") for arg in argv) else [f"--workdir={folders / 'run'}"]
    )
    ran = script("train.py", *argv, *workdir)
    assert ran.status == 2
    lines = [line for line in ran.lines if "pictures to train on" not in line]
    assert len(lines) == 1, ran.stderr
    assert lines[0].startswith("train.py: ")
    assert message in lines[0]
    assert {
        path: path.read_bytes() for path in sorted(folders.rglob("*")) if path.is_file()
    } == before


def test_data_without_one_readable_picture_is_one_line(script, folders):
    plain = ["--config.data.split_column=", "--config.data.holdout=0.0"]
    small = [
        "--config.model.first_stage.ch_mult=(1,)",
        "--config.model.first_stage.num_res_blocks=1",
    ]
    broken = f"--config.data.path={folders / 'broken'}"
    ran = script("train.py", CONFIG, f"--workdir={folders / 'run'}", broken, *plain, *small)
    assert ran.status == 2
    ours = [line for line in ran.lines if line.startswith("train.py: ")]
    assert len(ours) == 1, ran.stderr
    assert "no readable picture in" in ours[0]
    assert "Traceback" not in ran.stderr


@pytest.mark.processes
def test_train_py_prints_one_line_for_a_mistake_in_a_new_process(tmp_path):
    process = child(
        "train.py", CONFIG, f"--workdir={tmp_path / 'run'}", "--config.data.path=nowhere.zip"
    )
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 2
    assert stdout == ""
    assert (
        stderr == "train.py: nowhere.zip does not exist: "
        "give the path of a folder or .zip archive of pictures\n"
    )
    assert not (tmp_path / "run").exists()
