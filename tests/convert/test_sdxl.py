"""Stable Diffusion XL: its condition, its files in both layouts, and sampling."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from sdxl_models import model_of, random_params, sdxl_config

from ldm_jax.conditioning import make_conditioner
from ldm_jax.convert.conversion import export, read_model
from ldm_jax.convert.describe import describe
from ldm_jax.convert.originals import infer, original_of, whole_from_config
from ldm_jax.convert.tables import flatten, source_shapes
from ldm_jax.data.transforms import Crop, ImageTransform, View
from ldm_jax.errors import RequestError, TargetError
from ldm_jax.io.checkpoint import save_model
from ldm_jax.models.build import build, build_first_stage, check_params
from ldm_jax.models.unet import layout as layout_of
from ldm_jax.sampling.inputs import check_request, make_inputs
from ldm_jax.sampling.pipeline import Pipeline
from ldm_jax.sampling.request import Request


@pytest.fixture(scope="module")
def base() -> Any:
    return model_of(sdxl_config())


def same(left: Any, right: Any) -> None:
    a, b = flatten(left), flatten(right)
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[path], b[path]) for path in a)


@pytest.mark.parametrize("refiner", [False, True])
@pytest.mark.parametrize("form", ["compvis", "diffusers"])
def test_both_forms_hold_the_model_to_the_bit(tmp_path, refiner, form):
    config = sdxl_config(refiner)
    params = random_params(config)
    save_model(tmp_path / "model", config, params, dtype=None)
    out = tmp_path / ("x.safetensors" if form == "compvis" else "folder")
    export(tmp_path / "model", form, out)
    if form == "compvis" and not refiner:
        names = load_file(out)
        assert "conditioner.embedders.1.model.text_projection" in names
        assert names["conditioner.embedders.0.transformer.text_model.embeddings.position_ids"].size
    yaml = out.with_suffix(".yaml") if form == "compvis" else None
    found = read_model(out, config=yaml)
    same(found.params, params)
    back = found.config
    assert back["conditioner"]["vector"] == config["conditioner"]["vector"]
    assert back["conditioner"]["zero_empty"] is not refiner
    assert back["first_stage"]["force_upcast"]
    ours, theirs = (build(c, None, None) for c in (config, back))
    assert layout_of(ours.unet) == layout_of(theirs.unet)
    assert ours.unet.num_classes == theirs.unet.num_classes
    encoded = [c.conditioner.encode(["a red apple"]) for c in (ours, theirs)]
    jax.tree.map(
        np.testing.assert_array_equal, encoded[0], {**encoded[1], "sizes": encoded[0]["sizes"]}
    )


@pytest.mark.fast
def test_the_yaml_names_the_classes_and_is_inferred_from_names():
    config = sdxl_config()
    original = original_of(config)
    assert original.target == "sgm.models.diffusion.DiffusionEngine"
    models = original.params["conditioner_config"]["params"]["emb_models"]
    assert [m["target"].rsplit(".", 1)[1] for m in models[:2]] == [
        "FrozenCLIPEmbedder",
        "FrozenOpenCLIPEmbedder2",
    ]
    assert models[0]["params"]["layer_idx"] == 1
    whole = whole_from_config(original.target, original.params)
    shapes = source_shapes(whole.table, whole.shapes)
    arrays = {n: np.broadcast_to(np.float32(0), s) for n, s in shapes.items()}
    found = infer(arrays)
    # A level without attention has no depth.
    assert found.params["network_config"]["params"]["transformer_depth"] == 2
    again = whole_from_config(found.target, found.params)
    assert source_shapes(again.table, again.shapes) == shapes
    assert found.params["conditioner_config"]["params"]["emb_models"][2:] == models[2:]


@pytest.mark.fast
@pytest.mark.parametrize("refiner", [False, True])
def test_inspect_describes_every_part(refiner):
    original = original_of(sdxl_config(refiner))
    whole = whole_from_config(original.target, original.params)
    shapes = source_shapes(whole.table, whole.shapes)
    lines = describe(found_in({n: np.broadcast_to(np.float32(0), s) for n, s in shapes.items()}))
    assert lines["family"] == f"Stable Diffusion XL {'refiner' if refiner else 'base'} (sgm)"
    assert "model_channels 32, channel_mult [1, 2]" in lines["UNet"]
    towers = ["FrozenOpenCLIPEmbedder2 of txt"]
    towers = towers if refiner else ["FrozenCLIPEmbedder of txt", *towers]
    assert lines["condition"].startswith(", ".join(towers))
    assert lines["predicts"] == "eps"
    assert lines["first stage"].startswith("ch 32, ch_mult [1, 2]")


@pytest.mark.fast
@pytest.mark.parametrize(
    ("names", "family"),
    [
        (["add_embedding.linear_1.weight"], "UNet of Stable Diffusion XL (diffusers)"),
        (["model.diffusion_model.label_emb.0.0.weight"], "Stable Diffusion XL, the UNet alone"),
        (["cond_stage_model.model.positional_embedding"], "Stable Diffusion 2 (CompVis)"),
        (["controlnet_cond_embedding.conv_in.weight"], "ControlNet (diffusers)"),
        (["control_model.time_embed.0.weight"], "a ControlNet, not a model; give"),
        (["lora_unet_mid_block.lora_up.weight"], "a LoRA, not a model; give"),
        (["emb_params"], "a textual inversion embedding, not a model; give"),
        (["double_blocks.0.img_attn.qkv.weight"], "FLUX, which is not supported"),
        (["some.other.weight"], "unknown"),
    ],
)
def test_inspect_names_the_family_or_the_kind_of_file(names, family):
    lines = describe(found_in({name: np.zeros((2, 2), np.float32) for name in names}))
    assert lines["family"].startswith(family)


def found_in(arrays: dict[str, np.ndarray]) -> Any:
    return SimpleNamespace(
        tensors=arrays, tree={}, path=Path("x.safetensors"), format="safetensors", standins={}
    )


def test_a_file_without_parts_names_what_to_give(tmp_path):
    config = sdxl_config()
    params = random_params(config)
    save_model(tmp_path / "model", config, params, dtype=None)
    export(tmp_path / "model", "compvis", tmp_path / "x.safetensors")
    arrays = load_file(tmp_path / "x.safetensors")
    kept = {n: a for n, a in arrays.items() if not n.startswith("first_stage_model.")}
    save_file(kept, tmp_path / "no_vae.safetensors")
    yaml = tmp_path / "x.yaml"
    assert "--vae" in read_model(tmp_path / "no_vae.safetensors", config=yaml).lacks[0]
    kept = {n: a for n, a in arrays.items() if not n.startswith("conditioner.")}
    save_file(kept, tmp_path / "no_text.safetensors")
    assert "--text_encoder" in read_model(tmp_path / "no_text.safetensors", config=yaml).lacks[0]


@pytest.mark.fast
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"legacy": True}, "legacy"),
        ({"layer": "pooled"}, "layer"),
        ({"always_return_pooled": False}, "always_return_pooled"),
        ({"arch": "ViT-H-14"}, "arch"),
    ],
)
def test_other_options_of_the_embedders_are_refused_by_name(change, message):
    original = original_of(sdxl_config())
    original.params["conditioner_config"]["params"]["emb_models"][1]["params"] |= change
    with pytest.raises(TargetError, match=message):
        whole_from_config(original.target, original.params)


@pytest.mark.fast
def test_the_condition_of_a_row_and_the_dropped_one():
    config = sdxl_config()
    conditioner: Any = make_conditioner(config["conditioner"], jnp.float32)
    rows = np.arange(12, dtype=np.float32).reshape(2, 6)
    encoded = conditioner.encode_rows({"caption": ["a", "b"], "condition": rows})["encoded"]
    assert np.array_equal(encoded["sizes"], rows)
    assert (encoded["clip_l"][:, -1] == 49407).all()
    assert (encoded["clip_g"][:, -1] == 0).all()
    dropped = conditioner.drop(encoded, conditioner.null_row(), jnp.array([True, False]))
    assert np.array_equal(dropped["sizes"], rows)
    assert dropped["blank"].tolist() == [1.0, 0.0]
    settings = conditioner.row_condition(config["conditioner"], {}, lambda: ())
    view = View(ImageTransform((32, 32)), Crop(10, 20, 64, 64, False), (80, 120))
    sizes = settings({}, np.zeros((32, 32, 3), np.uint8), view, np.random.default_rng(0))
    assert sizes.tolist() == [80, 120, 5, 10, 32, 32]


def test_zeros_replace_the_states_of_the_empty_caption(base):
    conditioner = base.conditioner
    run = jax.jit(lambda p, e: conditioner(p, e))
    cond = run(base.params["conditioner"], conditioner.encode([""]))
    null = run(base.params["conditioner"], conditioner.encode_null(1))
    assert float(jnp.abs(cond.crossattn).max()) > 0.1
    assert not np.asarray(null.crossattn).any()
    assert not np.asarray(null.vector[:, :12]).any()
    assert np.array_equal(null.vector[:, 12:], cond.vector[:, 12:])


def test_sizes_of_a_request_reach_the_condition(base):
    pipe = Pipeline(base)

    def inputs(**given: Any) -> Any:
        request = check_request(base, Request(prompts=["a", "b"], **given))
        return make_inputs(base, request, pipe.complete(request))[1]

    plain = inputs()
    assert plain.encoded["sizes"].tolist() == [[32, 32, 0, 0, 32, 32]] * 2
    assert plain.null["blank"].tolist() == [1, 1]
    given = inputs(original_size=(64, 48), crop=(3, 4), target_size=(40, 40), negative="c")
    assert given.encoded["sizes"].tolist() == [[64, 48, 3, 4, 40, 40]] * 2
    assert given.null["sizes"].tolist() == [[64, 48, 3, 4, 40, 40]] * 2
    assert not given.null["blank"].any()
    with pytest.raises(RequestError, match="crop takes 2 numbers"):
        inputs(crop=(1, 2, 3))
    with pytest.raises(RequestError, match="takes no aesthetic_score"):
        inputs(aesthetic_score=6.0)
    refiner = model_of(sdxl_config(refiner=True))
    request = check_request(refiner, Request(prompts="a", aesthetic_score=7.0))
    found = make_inputs(refiner, request, Pipeline(refiner).complete(request))[1]
    assert found.encoded["sizes"].tolist() == [[32, 32, 0, 0, 7]]
    assert found.null["sizes"].tolist() == [[32, 32, 0, 0, 2.5]]


def test_sampling_depends_on_every_part_of_the_condition(base):
    pipe = Pipeline(base)
    plain = pipe("a red apple", steps=2, seeds=1)
    assert plain.shape == (1, 32, 32, 3)
    for change in ({"original_size": (4, 4)}, {"negative": "blue"}, {"prompts": "b"}):
        other = pipe(**{"prompts": "a red apple", "steps": 2, "seeds": 1, **change})
        assert (other != plain).any(), change


@pytest.mark.fast
def test_the_first_stage_computes_in_float32_where_the_model_is_half():
    config = sdxl_config()
    module: Any = build_first_stage(config, "float16")
    assert module.dtype == jnp.float32
    module = build_first_stage(config, "bfloat16")
    assert module.dtype == jnp.bfloat16
    check_params(model_of(json.loads(json.dumps(config))))


def test_a_refiner_takes_over_at_the_switch(base):
    pair = Pipeline(base, refiner=Pipeline(base))
    request = {"prompts": "a red apple", "steps": 5, "seeds": 3, "sampler": "ddim"}
    request |= {"grid": "trailing", "original_size": (64, 64)}
    whole = Pipeline(base)(**request)
    # A model that refines itself makes the same picture, to the rounding of a step.
    assert np.abs(pair(**request, switch=0.6).astype(int) - whole).max() <= 1
    other = Pipeline(model_of(sdxl_config(refiner=True)))
    pair = Pipeline(base, refiner=other)
    refined = pair(**request, switch=0.3)
    assert refined.shape == whole.shape
    assert (refined != whole).any()
    job = pair.job(Request(**request, switch=0.3, aesthetic_score=9.0))
    assert job.then is not None
    assert job.then.inputs.encoded["sizes"].tolist() == [[64, 64, 0, 0, 9]]
    assert job.then.inputs.null["sizes"].tolist() == [[64, 64, 0, 0, 2.5]]
    picture = np.zeros((32, 32, 3), np.uint8)
    assert pair(**request, image=picture, strength=0.9).shape == whole.shape
    with pytest.raises(RequestError, match="leaves no step"):
        pair(**request, switch=0.999)
    with pytest.raises(RequestError, match="switch needs a refiner"):
        Pipeline(base)(**request, switch=0.5)
    with pytest.raises(RequestError, match="chooses its own steps"):
        pair(**{**request, "sampler": "dpm_adaptive"})
    with pytest.raises(RequestError, match="progress_every takes no refiner"):
        pair(**request, progress_every=1)
