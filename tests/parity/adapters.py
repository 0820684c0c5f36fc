"""LoRA, textual inversion and ControlNet: files of the original tools over a small base model."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.conditioning import Cond, make_conditioner
from ldm_jax.conditioning.tokenizers import expand, tokens_of
from ldm_jax.convert.compvis.networks import param_shapes, table_of
from ldm_jax.convert.compvis.original import fields_of
from ldm_jax.convert.compvis.targets import (
    clip_text_from_params,
    module_from_config,
    unet_from_params,
)
from ldm_jax.convert.controlnet import read_controlnet
from ldm_jax.convert.embedding import extended, read_embedding
from ldm_jax.convert.lora import merge_lora
from ldm_jax.convert.reader.reader import open_checkpoint
from ldm_jax.convert.tables import Table, source_shapes, to_ours, to_theirs
from ldm_jax.diffusion.grids import step_grid
from ldm_jax.diffusion.guidance import predictor
from ldm_jax.diffusion.samplers import DDIM, sample
from ldm_jax.models.build import build

from . import sgm
from .golden import Case, NotYet, nchw

Results = dict[str, Any]
SCHEDULE = ("timesteps", "linear_start", "linear_end")
UNET, TEXT = "model.diffusion_model.", "cond_stage_model.transformer.text_model."


def weights_of(case: Case) -> dict[str, np.ndarray]:
    """All weights of a case, float32: its base's without ``params_drop``, its file's, its own."""
    weights: dict[str, np.ndarray] = {}
    if case.base is not None:
        weights = weights_of(case.base)
    if drop := tuple(case.spec.get("params_drop") or ()):
        weights = {name: array for name, array in weights.items() if not name.startswith(drop)}
    if file := case.spec.get("ckpt"):
        with open_checkpoint(case.folder / file) as checkpoint:
            weights |= {name: tensor.numpy() for name, tensor in checkpoint.tensors.items()}
    return {n: np.asarray(a, np.float32) for n, a in (weights | case.part("param")).items()}


def origin_of(case: Case, key: str) -> Case:
    """The case itself, or the nearest of its bases, whose kwargs have ``key``."""
    at: Case | None = case
    while at is not None and key not in at.kwargs:
        at = at.base
    if at is None:
        raise NotYet(f"no base with {key}")
    return at


class Base(NamedTuple):
    """A model under the adapters: its config, parameters, and the tables of its parts."""

    config: dict[str, Any]
    params: dict[str, Any]
    tables: dict[str, Table]

    def stored(self, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The parameters under the original's names."""
        parts = (to_theirs(table, params[part]) for part, table in self.tables.items())
        return {name: array for part in parts for name, array in part.items()}


def base_of(case: Case) -> Base:
    """A UNet and a text tower of Stable Diffusion v1's layout."""
    whole = origin_of(case, "unet_config").kwargs
    unet_kwargs = whole["unet_config"]["params"]
    text = origin_of(case, "clip_text")
    unet = unet_from_params(unet_kwargs)
    tower = clip_text_from_params(
        text.kwargs["clip_text"]
        | {"vocab_size": text.kwargs["vocab_size"], "max_position_embeddings": 77}
    )
    tables = {"unet": table_of(unet, UNET), "conditioner": table_of(tower, TEXT)}
    weights, params = weights_of(case), {}
    for part, module in (("unet", unet), ("conditioner", tower)):
        shapes = param_shapes(module)
        expected = source_shapes(tables[part], shapes, case.name)
        own = {n: a for n, a in weights.items() if expected.get(n) == a.shape}
        params[part] = to_ours(tables[part], own, shapes=shapes, where=case.name)
    config = {
        "kind": "latent_diffusion",
        "objective": "eps",
        "schedule": {name: whole[name] for name in SCHEDULE if name in whole},
        "first_stage": {"kind": "identity"},
        "unet": fields_of(unet),
        "conditioner": {"kind": "clip", **fields_of(tower)},
    }
    return Base(config, params, tables)


def run(base: Base, params: Any, case: Case, tokens: str = "tokens") -> tuple[Any, np.ndarray]:
    """(context, the UNet's output [b, c, h, w]) at the inputs of a case."""
    model = build(base.config, None, None)

    @jax.jit
    def call(params: Any, tokens: Any, x: Any, t: Any) -> Any:
        cond = model.conditioner(params["conditioner"], tokens)
        return cond.crossattn, model.apply(params, x, t, cond)

    context, out = call(params, case.inputs[tokens], case.image("x"), case.inputs["t"])
    return np.asarray(context), nchw(out)


def whole_base(case: Case) -> Results:
    """The base alone, with a context and a null context."""
    base = base_of(case)
    c, out = run(base, base.params, case)
    return {"c": c, "uc": run(base, base.params, case, "uncond_tokens")[0], "unet_no_control": out}


def lora(case: Case) -> Results:
    """Weights merged at several strengths, and what the model computes with them."""
    if "tokens" not in case.inputs:
        return lora_of_towers(case)
    base, file, results = base_of(case), case.folder / case.spec["lora_file"], {}
    before, touched = base.stored(base.params), case.spec["touched_keys"]
    for tag in sorted({m[1] for n in case.expected if (m := re.search(r"_(\d\d)$", n))}):
        params = merge_lora(base.config, base.params, file, int(tag) / 10)
        results |= changes(before, base.stored(params), touched, tag)
        context, out = run(base, params, case)
        rows = case.expected[f"c_merged_{tag}"].shape[1]
        results |= {f"c_merged_{tag}": context[:, :rows], f"unet_merged_{tag}": out}
        results[f"unet_unmerged_{tag}"] = out
    return results


def changes(before: Any, after: Any, touched: list[str], tag: str) -> Results:
    """What a LoRA changes of the stored weights, at the strength of a tag; "10" is 1."""
    changed = {name for name in after if not np.array_equal(after[name], before[name])}
    assert changed == set(touched), changed ^ set(touched)
    deltas = [(after[n].astype(np.float64) - before[n]).reshape(-1) for n in touched]
    results: Results = {
        f"delta_l1_{tag}": np.array([np.abs(d).sum() for d in deltas]),
        f"delta_dot_{tag}": np.array([(d * np.cos(np.arange(d.size))).sum() for d in deltas]),
    }
    if tag == "10":
        results |= {f"merged/{name}": after[name] for name in touched}
    return results


def lora_of_towers(case: Case) -> Results:
    """`lora` for a base with two text towers, Stable Diffusion XL."""
    base = origin_of(case, "conditioner_config")
    model, whole = sgm.engine_of(base), sgm.whole_of(base)
    conditioner: Any = model.conditioner
    given = case.inputs
    encoded = {
        **{name: given[f"tokens_{name}"].astype(np.int32) for name in conditioner.towers},
        "sizes": np.concatenate([given[name] for name in sgm.SIZES], axis=1),
        "blank": np.zeros(len(given["x"]), np.float32),
    }

    def stored(params: Any) -> dict[str, np.ndarray]:
        parts = {**params, "first_stage": model.first_stage.params}
        return to_theirs(whole.table, {part: parts[part] for part in whole.shapes})

    @jax.jit
    def call(params: Any, encoded: Any, x: Any, t: Any) -> Any:
        cond = conditioner(params["conditioner"], encoded)
        return cond.crossattn, cond.vector, model.apply(params, x, t, cond)

    before, results = stored(model.params), {}
    file, touched = case.folder / case.spec["lora_file"], case.spec["touched_keys"]
    for tag in sorted({m[1] for n in case.expected if (m := re.search(r"_(\d\d)$", n))}):
        params = merge_lora(model.config, model.params, file, int(tag) / 10)
        results |= changes(before, stored(params), touched, tag)
        context, vector, out = call(params, encoded, case.image("x"), given["t"])
        found = {"crossattn": context, "vector": vector, "unet": nchw(out)}
        results |= {f"{name}_{tag}": value for name, value in found.items()}
    return results


def inversion_of_towers(case: Case) -> Results:
    """`inversion` for the two text towers of Stable Diffusion XL."""
    embedding = read_embedding(case.folder / case.spec["ti_file"], case.spec["word"])
    model = sgm.engine_of(origin_of(case, "conditioner_config"))
    tokenizer, start, end = tokenizer_of(case, embedding.tokens)
    expanded = [expand(prompt, embedding.tokens) for prompt in case.spec["prompts"]]
    assert expanded == case.spec["converted"]
    results: Results = {}
    for name, pad in (("clip_l", end), ("clip_g", 0)):
        section = model.config["conditioner"][name]
        tower = model.params["conditioner"][name]
        fields, params = extended(section, tower, embedding, name)
        tokens = tokens_of(tokenizer, expanded, 77, start, end, pad)
        results[f"token_ids_{name}"] = tokens
        for label, more in (("first_eos", {}), ("argmax", {"eos_token_id": None})):
            text: Any = make_conditioner({**section, **fields, **more, "kind": "clip"}, jnp.float32)
            states: Any = jax.jit(text.module.apply)({"params": params}, tokens)
            if name == "clip_g":
                results[f"pooled_{label}"] = states.pooled
                results["clip_g_penultimate"] = states.hidden[-2][:, :16]
            else:
                results["clip_l_hidden"] = states.hidden[case.spec["layer_idx"]][:, :16]
    return results


def tokenizer_of(case: Case, added: Sequence[str]) -> tuple[Any, int, int]:
    """(the tokenizer of a case's small vocabulary with new words, its first and last token)."""
    from transformers import CLIPTokenizer

    vocabulary, merges = case.spec["vocab"], [tuple(pair) for pair in case.spec["merges"]]
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges)
    tokenizer.add_tokens(list(added))
    start, end = (vocabulary[f"<|{name}oftext|>"] for name in ("start", "end"))
    return tokenizer, start, end


def inversion(case: Case) -> Results:
    """The numbers of the tokens of prompts with a new word, and the states of the tower."""
    embedding = read_embedding(case.folder / case.spec["ti_file"])
    assert (embedding.word, len(embedding.tokens)) == (case.spec["word"], case.spec["n_vectors"])
    base = base_of(case)
    fields, params = extended(base.config["conditioner"], base.params["conditioner"], embedding)
    tokenizer, start, end = tokenizer_of(case, fields["added_tokens"])
    expanded = [expand(prompt, fields["added_tokens"]) for prompt in case.spec["prompts"]]
    assert expanded == case.spec["converted"]
    tokens = tokens_of(tokenizer, expanded, 77, start, end, end)
    module = make_conditioner(base.config["conditioner"] | fields, jnp.float32).towers[""].module
    states: Any = jax.jit(module.apply)({"params": params}, tokens)
    rows = case.expected["last_hidden_state"].shape[1]
    return {
        "token_ids": tokens,
        "last_hidden_state": states.last[:, :rows],
        "new_vectors": embedding.vectors[""],
    }


def controlled(case: Case) -> Results:
    """A ControlNet's features, the UNet with them in several ways, and guided DDIM."""
    kwargs = case.kwargs
    base = base_of(case)
    model = build(base.config, None, None)
    stage = kwargs["control_stage_config"]
    net, arrays = read_controlnet(case.folder / case.spec["ckpt"], model.unet)
    pool = bool(kwargs.get("global_average_pooling", False))
    only_mid = bool(kwargs.get("only_mid_control", False))
    assert net == module_from_config(stage["target"], stage["params"]).clone(
        out_channels=net.out_channels, remat=net.remat
    )
    arrays = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), arrays)
    net = net.clone(global_pool=pool)
    model = model.replace(
        controls=(net,), params={**base.params, "controls": {"0": arrays}}, first_stage=None
    )
    x, hint, t = case.image("x"), case.image("hint"), case.inputs["t"]
    c, uc = (
        run(base, base.params, origin_of(case, "clip_text"), name)[0]
        for name in ("tokens", "uncond_tokens")
    )
    ones = np.ones((len(x), 1), np.float32)

    @jax.jit
    def features(params: Any, x: Any, t: Any) -> Any:
        inside = {"capture_intermediates": lambda m, _: m.name == "hint_7"}
        found, state = net.apply(
            {"params": params}, x, hint, t, c, **inside, mutable=["intermediates"]
        )
        return found, state["intermediates"]["hint_7"]["__call__"][0]

    @jax.jit
    def unet(params: Any, controls: Any) -> Any:
        return model.apply(params, x, t, Cond(crossattn=c), controls=controls)

    @jax.jit
    def whole(params: Any, scale: Any) -> Any:
        own = model.replace(params=params)
        control = own.control_features(x, t, Cond(crossattn=c), ((hint,), scale * ones))
        return own.apply(params, x, t, Cond(crossattn=c), controls=control)

    found, guide = features(arrays, x, t)
    results: Results = {f"control_{i}": nchw(f) for i, f in enumerate(found)}
    results["hint_features"] = nchw(guide)
    count = len(found)
    params = model.params
    plain = unet(params, found[-1:]) if only_mid else None
    for tag, scale in (("1", 1.0), ("06", 0.6)):
        one = unet(params, (scale * found[-1],)) if only_mid else whole(params, np.float32(scale))
        results[f"eps_scale{tag}"] = nchw(one)
    results["eps_only_mid"] = nchw(unet(params, found[-1:]) if plain is None else plain)
    falling = [np.float32(0.825 ** (count - 1 - i)) for i in range(count)]
    guess = tuple(scale * f for scale, f in zip(falling, found, strict=True))
    results["eps_guess"] = nchw(unet(params, guess[-1:] if only_mid else guess))
    means = tuple(jnp.broadcast_to(f.mean((1, 2), keepdims=True), f.shape) for f in found)
    results["eps_global_pool"] = nchw(unet(params, means[-1:] if only_mid else means))
    if "ddim_steps" in case.expected and not only_mid:
        results["ddim_steps"] = ddim(case, model, (c, uc), hint)
    return results


def ddim(case: Case, model: Any, contexts: Any, hint: np.ndarray) -> np.ndarray:
    """Guided DDIM from x_T [1 + steps, b, c, h, w]; the null condition has the hint, too."""
    count = case.expected["ddim_steps"].shape[0] - 1
    grid = step_grid("uniform", count, model.schedule.timesteps, compat=True)
    nodes, scale = DDIM().nodes(model.schedule, grid), case.spec["guidance_scale"]

    @jax.jit
    def program(params: Any, x: Any) -> Any:
        own = model.replace(params=params, conditioner=Given())
        control = (hint,), jnp.ones((len(x), 1))
        denoise = own.denoiser(contexts[0], contexts[1], scale, control=control)
        predict = predictor(denoise, own.schedule, own.objective)
        noise = jnp.zeros((count, 1, *x.shape))
        return sample(DDIM(), predict, x, nodes, schedule=own.schedule, noise=noise, trace=True)[
            1
        ].x

    x = case.image("x_T")
    steps = program(model.params, x)
    return np.concatenate([nchw(x)[None], nchw(steps)])


class Given:
    """A conditioner of ready-made contexts [b, m, k]."""

    def __call__(self, params: Any, encoded: Any) -> Cond:
        return Cond(crossattn=encoded)

    def with_kernels(self, kernels: Any) -> "Given":
        return self


CASES: dict[str, Callable[[Case], Results]] = {
    "ldm.models.diffusion.ddpm.LatentDiffusion (UNet and HF CLIP text tower only)": whole_base,
    "networks.lora.LoRANetwork (kohya-ss sd-scripts)": lora,
    "diffusers.StableDiffusionPipeline.save_lora_weights (peft)": lora,
    "diffusers.loaders.TextualInversionLoaderMixin + transformers.CLIPTextModel": inversion,
    "diffusers.loaders.TextualInversionLoaderMixin + the two SDXL text towers": inversion_of_towers,
    "cldm.cldm.ControlLDM": controlled,
    **{
        f"lycoris.kohya.LycorisNetworkKohya algo={name}": lora for name in ("locon", "loha", "lokr")
    },
}
