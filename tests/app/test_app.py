"""The page, driven through its HTTP interface."""

import json
import re

import jax
import numpy as np
import pytest
from conftest import TINY, pipeline_of, random_params
from PIL import Image

pytest.importorskip("gradio", reason="needs gradio: pip install ldm_jax[app]")

import gradio as gr
import httpx
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from ldm_jax.app.page import build, fits
from ldm_jax.app.server import launch
from ldm_jax.app.studio import Studio
from ldm_jax.errors import RequestError
from ldm_jax.io.png import read_settings, save_png
from ldm_jax.models import code_transformer
from ldm_jax.models.autoencoder import init_autoencoder
from ldm_jax.sampling.codes import CodePipeline

MASKED = {"kind": "joined", "of": "masked", "channels": 5, "size": [8, 8]}
KINDS = {
    "class": ({"kind": "class", "n_classes": 3, "embed_dim": 16}, 4, True),
    "rescale": ({"kind": "rescale", "n_stages": 1, "in_channels": 4, "size": [16, 16]}, 8, False),
    "tokens": ({"kind": "tokens", "dim": 16, "depth": 1, "vocab_size": 50, "max_seq_len": 12,
                "heads": 2, "head_dim": 8}, 4, True),
    "joined": ({"kind": "joined", "channels": 3, "size": [8, 8]}, 7, False),
    "masked": (MASKED, 9, False),
    "none": ({"kind": "none"}, 4, False),
    "hybrid": ({"kind": "hybrid", "text": TINY["conditioner"] | {"kind": "bert"},
                "joined": {"of": "masked", "channels": 5, "size": [8, 8]}}, 9, True),
}  # fmt: skip
EDITS = ["Image to image", "Inpainting", "Outpainting"]
TABS = {
    "class": ["Class to image", *EDITS, "Interpolation"],
    "rescale": ["Map to image", *EDITS],
    "tokens": ["Boxes to image", *EDITS],
    "joined": ["Super-resolution"],
    "masked": ["Inpainting", "Outpainting"],
    "none": ["Images", *EDITS, "Interpolation"],
    "hybrid": ["Inpainting", "Outpainting"],
}


def tabs(page: gr.Blocks) -> list[str]:
    """The titles of a page's tabs."""
    config = page.get_config_file()
    return [c["props"]["label"] for c in config["components"] if c["type"] == "tabitem"]


@pytest.mark.parametrize("kind", KINDS)
def test_tabs_are_what_the_model_can_do(kind, tmp_path):
    conditioner, channels, attends = KINDS[kind]
    unet = TINY["unet"] | {"in_channels": channels}
    if not attends:
        unet = unet | {"use_spatial_transformer": False, "context_dim": None}
    model = TINY | {"conditioner": conditioner, "unet": unet}
    model["sampling"] = {"size": [16, 16], "steps": 4}
    page = build(Studio(pipeline_of(model), {"model": "tiny"}, tmp_path))
    assert tabs(page) == TABS[kind]


def test_a_transformer_has_the_settings_that_it_takes(tmp_path):
    model = {
        "kind": "transformer",
        "transformer": {
            "vocab_size": 20, "block_size": 32, "n_layer": 1, "n_head": 2, "n_embd": 16,
        },
        "first_stage": {
            "kind": "vq", "n_embed": 16, "embed_dim": 4, "z_channels": 4, "ch": 8,
            "ch_mult": [1, 2], "num_res_blocks": 1, "norm_groups": 4, "attn_resolutions": [],
            "resolution": 8, "in_channels": 3, "out_ch": 3,
        },
        "conditioner": {"kind": "label", "n_classes": 3},
        "sampling": {"size": [8, 8]},
    }  # fmt: skip
    made, key = code_transformer.build(model, None), jax.random.key(0)
    params = jax.eval_shape(lambda: code_transformer.init_transformer(made, key))
    stage = jax.eval_shape(lambda: init_autoencoder(made.first_stage.module, key))
    made = made.replace(
        params={"conditioner": {}, "transformer": random_params(params, 0)},
        first_stage=made.first_stage.replace(params=random_params(stage, 1)),
    )
    studio = Studio(CodePipeline(made, devices=1), {"model": "m"}, tmp_path / "out")
    page = build(studio)
    assert tabs(page) == ["Class to image", *EDITS]
    shown = {
        c["props"].get("label"): c["props"].get("visible", True)
        for c in page.get_config_file()["components"]
    }
    assert shown["top_k"]
    assert not shown["Steps"]
    assert not shown["Guidance"]
    assert not shown["Sampler"]
    assert "eta" not in shown
    list(studio.run({"class": "1", "num": 2, "seed": 3, "top_k": "4"}))
    kept = [read_settings(path) for path in sorted((tmp_path / "out").glob("*.png"))]
    kept = [row for row in kept if "seed" in row]  # the grid has none
    made = [(row["class"], row["seed"], row["top_k"]) for row in kept]
    assert made == [("1", 3, 4), ("1", 4, 4)]
    fits(kept[0], studio.pipe.defaults.sampler)


@pytest.fixture(scope="module")
def served(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("app")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "gradio"))
        studio = Studio(pipe, {"model": "tiny"}, folder / "out")
        page = launch(studio, max_upload=1, block=False)
        yield page.local_url, studio
        page.close()


@pytest.fixture(scope="module")
def client(served):
    return Client(served[0], verbose=False)


def settings(client: Client, **given) -> dict:
    """The arguments of an endpoint: empty, but for those that are given."""
    found = {"prompt": "red apple", "negative_prompt": "", "pictures": 2, "seed": "3", "steps": 4}
    return found | {"guidance": 3.0, "sampler": "ddim"} | given


def test_a_request_makes_pictures_with_their_settings(client, served):
    made = client.predict(**settings(client), api_name="/generate")
    _, gallery, status, files, code, command = made
    assert status.startswith("2 pictures in")
    assert [entry["caption"] for entry in gallery["value"]] == ["seed 3", "seed 4"]
    kept = [read_settings(path) for path in files["value"][:2]]
    assert [(row["prompt"], row["seed"]) for row in kept] == [("red apple", 3), ("red apple", 4)]
    assert "grid" in files["value"][2]
    assert "--prompt='red apple'" in command
    assert "seeds=[3, 4]" in code
    job = client.submit(**settings(client, pictures=1), api_name="/generate")
    job.result(60)
    shown = [output[2] for output in job.outputs()]
    assert [text.split(" %")[0] for text in shown if " %" in text] == ["25", "50", "75"]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"seed": "minus one"}, "write a whole number"),
        ({"seed": str(2**64)}, "write a whole number from 0 to 18446744073709551615"),
        ({"prompt": " "}, "there is no prompt"),
        ({"several_steps": "3,x"}, "--steps=3,x: write whole numbers, separated by commas"),
        ({"eta": "<img src=x>"}, "--eta=&lt;img src=x&gt;: write a number"),
        ({"size": "16x17"}, "must be multiples of 4"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(client, given, text):
    with pytest.raises(AppError) as caught:
        client.predict(**settings(client, **given), api_name="/generate")
    assert text in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_images_are_checked(client, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    wide = tmp_path / "wide.png"
    Image.new("1", (60000, 100)).save(wide)
    for path, text in ((tmp_path / "text.png", "not a picture that Pillow can read"),
                       (wide, "too narrow")):  # fmt: skip
        with pytest.raises(AppError, match=text):
            client.predict(
                **settings(client, image_to_start_from=handle_file(path)),
                api_name="/image_to_image",
            )
    with pytest.raises(AppError, match="there is no image: upload one"):
        client.predict(**settings(client, image_to_start_from=None), api_name="/image_to_image")


def test_an_upload_that_is_too_large_is_refused(served):
    answer = httpx.post(f"{served[0]}gradio_api/upload", files={"files": b"x" * (2**20 + 1)})
    assert answer.status_code == 413
    assert "exceed" in answer.text


def restored(client: Client, path) -> dict:
    """What dropping a picture sets: its prompt, seed and steps."""
    values = client.predict(handle_file(path), api_name="/restore")
    texts = [value for value in values if isinstance(value, str | int | float)]
    return {"texts": texts}


def test_a_picture_restores_its_settings(client, served, tmp_path):
    _, _, _, files, _, _ = client.predict(
        **settings(client, seed="18446744073709551615", pictures=1, eta="0.5"), api_name="/generate"
    )
    texts = restored(client, files["value"][0])["texts"]
    assert "18446744073709551615" in texts
    assert "red apple" in texts
    assert "0.5" in texts


HOSTILE = {
    "no settings": (None, "was not made by ldm_jax"),
    "a number as prompt": ({"prompt": 3}, "prompts must be texts"),
    "steps of text": ({"steps": "many"}, "steps must be a whole number"),
    "an unknown sampler": ({"sampler": "<script>alert(1)</script>"}, "&lt;script"),
    "a long prompt": ({"prompt": "x" * 30_000}, "a prompt is too long"),
    "endless settings": ({"junk": "x" * 200_000}, "its settings are damaged"),
    "a seed of infinity": ({"seed": float("inf")}, "seeds must be whole numbers"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_settings_are_refused_in_one_line(client, name, tmp_path):
    change, text = HOSTILE[name]
    kept = {"model": "tiny", "prompt": "x", "seed": 0, "steps": 4, "sampler": "ddim"}
    save_png(
        tmp_path / "x.png", np.zeros((8, 8, 3), np.uint8), None if change is None else kept | change
    )
    with pytest.raises(AppError) as caught:
        restored(client, tmp_path / "x.png")
    assert text in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


def test_a_pictures_settings_name_no_file_of_this_machine(client, tmp_path):
    secret = tmp_path / "secret.png"
    Image.new("RGB", (8, 8)).save(secret)
    kept = {"model": "tiny", "prompt": "x", "seed": 0, "image": str(secret), "strength": 0.5}
    save_png(tmp_path / "x.png", np.zeros((8, 8, 3), np.uint8), kept)
    values = client.predict(handle_file(tmp_path / "x.png"), api_name="/restore")
    assert "secret" not in json.dumps(values, default=str)


def test_the_page_calls_no_other_host(served):
    answer = httpx.get(served[0])
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "http" not in policy
    assert not re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="https?://', answer.text)
    config = httpx.get(f"{served[0]}config").json()
    assert config["analytics_enabled"] is False


def test_a_condition_without_an_input_is_refused(pipe, tmp_path, monkeypatch):
    studio = Studio(pipe, {"model": "tiny"}, tmp_path)
    monkeypatch.setattr(type(studio.conditioner), "field", "condition")
    with pytest.raises(RequestError, match="no input for the condition 'condition'"):
        build(studio)
