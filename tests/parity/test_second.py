"""The networks of SD 2.x, SDXL and ControlNet against the second set of reference data."""

import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from ldm_jax.convert.compvis import blocks
from ldm_jax.convert.compvis.networks import param_shapes, unet_table
from ldm_jax.convert.reader.reader import open_checkpoint
from ldm_jax.convert.tables import source_shapes, to_ours
from ldm_jax.models.clip import CLIPText
from ldm_jax.models.controlnet import HINT, ControlNet
from ldm_jax.models.unet import UNet
from ldm_jax.nn.attention import SpatialTransformer

from .golden import REPO, nchw, nhwc

FOLDER = Path(os.environ.get("LDM_JAX_GOLDEN2", REPO.parent / "shared" / "golden2"))
UNET = "model.diffusion_model."

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(
        not (FOLDER / "manifest.json").is_file(), reason="LDM_JAX_GOLDEN2 names no reference data"
    ),
]


class Case:
    """A case: its arrays ``inputs``, ``expected`` and ``weights`` (float32) by name."""

    def __init__(self, name: str):
        cases = json.loads((FOLDER / "manifest.json").read_text())["cases"]
        self.spec = cases[name]
        arrays = load_file(FOLDER / self.spec["file"])
        self.inputs, self.expected, own = (
            {n.removeprefix(kind): a for n, a in arrays.items() if n.startswith(kind)}
            for kind in ("in/", "out/", "param/")
        )
        self.weights: dict[str, np.ndarray] = {}
        if base := self.spec.get("params_from"):
            drop = tuple(self.spec.get("params_drop") or ())
            inherited = Case(base).weights
            self.weights = {n: a for n, a in inherited.items() if not n.startswith(drop or ("\0",))}
        if file := self.spec.get("ckpt"):
            self.weights |= weights_of(FOLDER / file)
        self.weights |= own
        self.weights = {n: np.asarray(a, np.float32) for n, a in self.weights.items()}

    def check(self, name: str, found: Any) -> None:
        atol, rtol = self.spec["atol"][name], self.spec["rtol"]
        np.testing.assert_allclose(found, self.expected[name], rtol=rtol, atol=atol, err_msg=name)


def weights_of(file: Path) -> dict[str, np.ndarray]:
    if file.suffix == ".safetensors":
        return load_file(file)
    with open_checkpoint(file) as checkpoint:
        return {name: np.asarray(tensor.numpy()) for name, tensor in checkpoint.tensors.items()}


def unet_of(params: dict[str, Any], cls: type[UNet] = UNet, **more: Any) -> UNet:
    """Our UNet of the original's arguments."""
    leave = ("use_checkpoint", "spatial_transformer_attn_type", "image_size", "hint_channels")
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in params.items()}
    fields = {k: v for k, v in fields.items() if k not in leave}
    if isinstance(fields["context_dim"], tuple):
        fields["context_dim"] = fields["context_dim"][0]
    return cls(**{"use_spatial_transformer": True, **fields, **more})


def matrices(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Linear projections of transformers as the 1x1 convolutions that they equal."""
    return {
        name: a[:, :, None, None]
        if a.ndim == 2 and name.endswith(("proj_in.weight", "proj_out.weight"))
        else a
        for name, a in weights.items()
    }


def pair(weights: dict[str, np.ndarray], prefix: str) -> dict[str, Any]:
    """The two linear layers of an embedding."""
    return {
        f"dense_{i}": {
            "kernel": weights[f"{prefix}.{n}.weight"].T,
            "bias": weights[f"{prefix}.{n}.bias"],
        }
        for i, n in enumerate((0, 2))
    }


def unet_params(unet: UNet, weights: dict[str, np.ndarray], label: str = "") -> dict[str, Any]:
    bare = unet.clone(num_classes=None, adm_in_channels=None)
    table, shapes = unet_table(bare, UNET), param_shapes(bare)
    expected = source_shapes(table, shapes, "the case")
    # Weights of another case may be of layers that this one lacks, or has in another shape.
    own = {n: a for n, a in weights.items() if expected.get(n) == a.shape}
    own |= {n: a for n, a in matrices(weights).items() if expected.get(n) == a.shape}
    params = to_ours(table, own, shapes=shapes, where="the case")
    return {**params, "label_emb": pair(weights, f"{UNET}label_emb.{label}")} if label else params


@pytest.mark.parametrize("name", ["ckpt_sdxl", "sdxl_refiner"])
def test_the_unet_of_sdxl(name):
    case = Case(name)
    fields = case.spec["kwargs"]["network_config"]["params"]
    unet = unet_of(fields)
    params = unet_params(unet, case.weights, "0")
    out = jax.jit(unet.apply)(
        {"params": params},
        nhwc(case.inputs["x"]),
        case.inputs["t"],
        case.expected["crossattn"],
        case.expected["vector"],
    )
    case.check("unet", nchw(out))


def test_a_scalar_condition_and_options_of_a_level():
    case = Case("unet_sgm_timestep")
    unet = unet_of(case.spec["kwargs"])
    params = unet_params(unet, case.weights, "1")
    inputs = (case.inputs[n] for n in ("t", "context", "y"))
    out = jax.jit(unet.apply)({"params": params}, nhwc(case.inputs["x"]), *inputs)
    case.check("out", nchw(out))


def test_linear_projections_and_the_epsilon_of_a_transformer():
    case = Case("eps_sgm_spatialtransformer")
    module = SpatialTransformer(2, 16, 2)
    x, context = nhwc(case.inputs["x"]), case.inputs["context"]
    table = list(blocks.spatial_transformer("", (), depth=2))
    shapes = param_shapes(module, x, context)
    params = to_ours(table, matrices(case.weights), shapes=shapes, where="the case")
    apply = jax.jit(module.apply)
    case.check("out", nchw(apply({"params": params}, x, context)))
    case.check("out_big", nchw(apply({"params": params}, 512 * x, context)))


def open_clip_params(weights: dict[str, np.ndarray], prefix: str, layers: int) -> dict[str, Any]:
    w = {n.removeprefix(prefix): a for n, a in weights.items() if n.startswith(prefix)}

    def norm(name: str) -> dict[str, np.ndarray]:
        return {"scale": w[f"{name}.weight"], "bias": w[f"{name}.bias"]}

    def dense(name: str) -> dict[str, np.ndarray]:
        return {"kernel": w[f"{name}.weight"].T, "bias": w[f"{name}.bias"]}

    params: dict[str, Any] = {
        "token_embedding": {"embedding": w["token_embedding.weight"]},
        "position_embedding": w["positional_embedding"],
        "final_norm": norm("ln_final"),
        "projection": {"kernel": w["text_projection"]},
    }
    for i in range(layers):
        at = f"transformer.resblocks.{i}"
        kernels = np.split(w[f"{at}.attn.in_proj_weight"], 3)
        biases = np.split(w[f"{at}.attn.in_proj_bias"], 3)
        params[f"layers_{i}"] = {
            **{
                n: {"kernel": kernel.T, "bias": bias}
                for n, kernel, bias in zip("qkv", kernels, biases, strict=True)
            },
            "out": dense(f"{at}.attn.out_proj"),
            "norm1": norm(f"{at}.ln_1"),
            "norm2": norm(f"{at}.ln_2"),
            "fc1": dense(f"{at}.mlp.c_fc"),
            "fc2": dense(f"{at}.mlp.c_proj"),
        }
    return params


def test_the_tower_of_open_clip():
    case = Case("sdxl_embedders")
    width, heads, layers, dim = case.spec["kwargs"]["open_clip"]
    tower = CLIPText(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_act="gelu",
        vocab_size=64,
        projection_dim=dim,
    )
    params = open_clip_params(case.weights, "conditioner.embedders.1.model.", layers)
    states: Any = jax.jit(tower.apply)(
        {"params": params}, jnp.asarray(case.inputs["tokens_clip_g"])
    )
    case.check("openclip_pooled", states.pooled)
    case.check("openclip_last", states.hidden[-1][:, :16])
    case.check("openclip_penultimate", states.hidden[-2][:, :16])
    case.check("openclip_legacy_last", states.last[:, :16])
    case.check("openclip_legacy_penultimate", states.penultimate[:, :16])


def conv_params(weights: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    kernel = weights[f"{name}.weight"].transpose(2, 3, 1, 0)
    return {"kernel": kernel, "bias": weights[f"{name}.bias"]}


def test_controlnet():
    case = Case("ckpt_controlnet")
    fields = case.spec["kwargs"]["control_stage_config"]["params"]
    net = unet_of(fields, ControlNet, out_channels=4)
    assert isinstance(net, ControlNet)
    control = "control_model."
    w = {n.removeprefix(control): a for n, a in case.weights.items() if n.startswith(control)}
    # The table of a UNet, for the half that they share.
    unet = unet_of(fields, out_channels=4)
    shared = ("time_embed", "input_blocks", "middle_block.")
    own = {UNET + n: a for n, a in w.items() if n.startswith(shared)}
    table = [e for e in unet_table(unet, UNET) if e.source.removeprefix(UNET).startswith(shared)]
    shapes = {n: s for n, s in param_shapes(unet).items() if n.startswith(("time", "inp", "mid"))}
    params = to_ours(table, own, shapes=shapes, where="the case")
    params |= {
        f"hint_{i}": conv_params(w, f"input_hint_block.{2 * i}") for i in range(len(HINT) + 1)
    }
    count = sum(n.startswith("zero_convs") and n.endswith("weight") for n in w)
    params |= {f"zero_convs_{i}": conv_params(w, f"zero_convs.{i}.0") for i in range(count)}
    params["middle_block_out"] = conv_params(w, "middle_block_out.0")

    x, t, hint = nhwc(case.inputs["x"]), case.inputs["t"], nhwc(case.inputs["hint"])
    context = Case("sd1_base").expected["c"]
    controls = jax.jit(net.apply)({"params": params}, x, hint, t, context)
    for i, found in enumerate(controls):
        case.check(f"control_{i}", nchw(found))

    model = unet_of(case.spec["kwargs"]["unet_config"]["params"])
    variables = {"params": unet_params(model, case.weights)}
    apply = jax.jit(model.apply)
    for name, scaled in {
        "eps_scale1": controls,
        "eps_scale06": tuple(0.6 * c for c in controls),
        "eps_only_mid": controls[-1:],
        "eps_guess": tuple(0.825 ** (4 - i) * c for i, c in enumerate(controls)),
        "eps_global_pool": tuple(
            jnp.broadcast_to(c.mean((1, 2), keepdims=True), c.shape) for c in controls
        ),
    }.items():
        case.check(name, nchw(apply(variables, x, t, context, controls=scaled)))
