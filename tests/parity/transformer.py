"""Transformers over codes: training, sampling, sliding windows and the optimiser of each case."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ldm_jax.configs.common import base
from ldm_jax.convert.compvis.infer import Original
from ldm_jax.convert.compvis.networks import table_of
from ldm_jax.convert.compvis.original import config_of
from ldm_jax.convert.compvis.reading import from_compvis
from ldm_jax.convert.compvis.whole import whole_from_config
from ldm_jax.convert.tables import to_theirs
from ldm_jax.errors import TargetError
from ldm_jax.models.code_transformer import CodeTransformer, build, cross_entropy, keep_codes
from ldm_jax.models.gpt import Choice, generate, generate_windows, one_pass, sliding_cells
from ldm_jax.train.optim import make_optimizer
from ldm_jax.train.tasks.transformer import decayed

from .golden import Case, NotYet, nchw

Results = dict[str, Any]
TARGET = "taming.models.cond_transformer.Net2NetTransformer"
WINDOW = (16, 16)


def model_of(case: Case) -> CodeTransformer:
    """The model of a case, by its class and arguments, with the case's weights."""
    original = Original(TARGET, dict(case.kwargs))
    try:
        if "ckpt" in case.spec:
            converted = from_compvis(case.folder / case.spec["ckpt"], config=original)
            config, params = converted.config, dict(converted.params)
        else:
            whole = whole_from_config(TARGET, case.kwargs)
            config = config_of(original, whole.modules)
            params = case.params(whole.table, whole.shapes)
    except TargetError as error:
        raise NotYet(str(error)) from None
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), {"conditioner": {}, **params})
    stage = params.pop("first_stage")
    return build(config, params, first_stage_params=stage)


def encoded_of(case: Case, model: CodeTransformer, rows: int) -> Any:
    """The condition of a case as the conditioner's network takes it."""
    key = case.kwargs.get("cond_stage_key", "depth")
    if key not in case.inputs:
        return model.conditioner.encode_null(rows)
    value = case.inputs[key]
    if key == "coord":
        return value.reshape(value.shape[:3])
    if value.ndim == 1:
        return model.conditioner.encode(value.tolist())
    return value.astype(np.float32)


@contextmanager
def recorded_dropout(inputs: Mapping[str, np.ndarray]) -> Iterator[None]:
    """Replaces the draws of dropout by the recorded uniform numbers, in the order of the calls."""
    uniforms = iter([a for name, a in inputs.items() if name.startswith("u_dropout")])

    def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if not isinstance(module, nn.Dropout) or module.deterministic or not module.rate:
            return call(*args, **kwargs)
        return jnp.where(next(uniforms) >= module.rate, args[0] / (1 - module.rate), 0.0)

    with nn.intercept_methods(intercept):
        yield
    assert next(uniforms, None) is None, "not every recorded draw was used"


def decoded_condition(case: Case, model: CodeTransformer, encoded: Any) -> Results:
    """The condition's codes and what its stage makes of them."""
    conditioner: Any = model.conditioner
    kind = model.config["conditioner"]["kind"]
    if kind == "coordinates":
        rounded = conditioner.rounded(jnp.asarray(encoded))[..., None]
        big = jax.image.resize(
            rounded / conditioner.n_embed,
            (len(encoded), *encoded.shape[1:3], 1),
            "nearest",
        )
        return {"quant_c": nchw(rounded), "cond_decoded": nchw(big)}
    if kind != "coded_map":
        return {}
    variables = {"params": model.params["conditioner"]}
    indices = conditioner(model.params["conditioner"], encoded).tokens
    codes = conditioner.module.apply(variables, indices, method="codes")
    decoded = conditioner.module.apply(variables, codes, method="decode", quantize=False)
    return {"quant_c": nchw(codes), "cond_decoded": nchw(decoded)}


def net2net(case: Case) -> Results:
    model = model_of(case)
    if "optimizer" in case.spec:
        return optimizer(case, model)
    x, inputs = jnp.asarray(case.inputs["image"]), case.inputs
    encoded = encoded_of(case, model, len(x))
    condition = jax.jit(model.condition)(model.params["conditioner"], encoded)
    codes = jax.jit(lambda model, x: model.codes_of(x))(model, x)
    c, z = condition.reshape(len(x), -1), model.sequence(codes)
    h, w = codes.shape[1:]
    n, params = h * w, model.params["transformer"]
    results: Results = {"z_indices": z, "c_indices": c, "target": z}
    if model.pkeep <= 0:
        run = jax.jit(partial(one_pass, model.gpt), static_argnames="choice")
        results["onepass_greedy"] = run(params, c, z[:, :1])[..., None]
        u = inputs["u"].reshape(len(x), -1)
        pass_of = partial(one_pass, model.gpt, params, c, z[:, :1])
        results["onepass_top4"] = pass_of(uniforms=u, choice=Choice(1.3, 4))
        return results

    training = "in train mode" in case.spec["call"]
    given = (
        keep_codes(z, inputs["r_indices"], inputs["u_pkeep"], model.pkeep)
        if (training and "u_pkeep" in inputs)
        else z
    )
    options = {"train": True, "rngs": {"dropout": jax.random.key(0)}} if training else {}

    @jax.jit
    def loss(params: Any) -> Any:
        with recorded_dropout(inputs):
            return cross_entropy(model.logits(params, c, given, **options), z)

    results["loss"], grads = jax.value_and_grad(loss)(params)
    theirs = to_theirs(table_of(model.gpt, "transformer."), grads)
    results |= {f"grad:{name}": a for name, a in theirs.items()}
    logits = jax.jit(model.logits)(params, c, z)
    results |= {"logits_eval": logits, "logits": logits}

    def sample(given: jax.Array, **options: Any) -> jax.Array:
        tokens = jnp.concatenate([c, given], axis=1)
        run = jax.jit(lambda p, t: generate(model.gpt, p, t, n - given.shape[1], **options).tokens)
        return run(params, tokens)[:, c.shape[1] :]

    results["greedy"] = sample(z[:, :0])
    decode = jax.jit(lambda model, z: model.decode(model.grid(z, h, w)))
    results["decoded"] = nchw(decode(model, results["greedy"]))
    if "u_half" in inputs:
        half = {"uniforms": jnp.asarray(inputs["u_half"]), "choice": Choice(1.0, 7)}
        results["half_top7"] = sample(z[:, : n // 2], **half)
        full = {"uniforms": jnp.asarray(inputs["u_full"]), "choice": Choice(0.9, 5)}
        results["full_top5_t09"] = sample(z[:, :0], **full)
        results["decoded_full"] = nchw(decode(model, results["full_top5_t09"]))
    results["reconstruction"] = nchw(decode(model, z))
    results["quant_z"] = nchw(model.entries(codes))
    return results | decoded_condition(case, model, encoded)


def optimizer(case: Case, model: CodeTransformer) -> Results:
    """Three steps of AdamW on one batch."""
    recorded = case.spec["optimizer"]
    hyper, config = recorded["hyper"], base("transformer")
    b1, b2 = hyper["betas"]
    config.optim.update(lr=hyper["lr"], weight_decay=hyper["weight_decay"], b1=b1, b2=b2)
    tx, params = make_optimizer(config.optim, 3, decayed), model.params["transformer"]
    mask = to_theirs(
        table_of(model.gpt, ""),
        jax.tree.map(lambda p, d: np.full(p.shape, d), params, decayed(params)),
    )
    decays = sorted(name for name, a in mask.items() if "attn.mask" not in name and a.all())
    assert decays == recorded["decay"]
    x = jnp.asarray(case.inputs["image"])
    c = model.condition({}, model.conditioner.encode_null(len(x)))
    z = model.sequence(model.codes_of(x))

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        loss, grads = jax.value_and_grad(lambda p: cross_entropy(model.logits(p, c, z), z))(params)
        updates, state = tx.update(grads, state, params)
        return loss, optax.apply_updates(params, updates), state

    state, losses = tx.init(params), []
    for _ in range(3):
        loss, params, state = step(params, state)
        losses.append(loss)
    theirs = to_theirs(table_of(model.gpt, "transformer."), params)
    return {"losses": jnp.stack(losses)} | {f"after3.{name}": a for name, a in theirs.items()}


def fast(case: Case) -> Results:
    """sample_with_past: a token at a time, with the cache of keys and values."""
    model = model_of(case)
    spec, u = case.spec, jnp.asarray(case.inputs["u"])
    top_k, top_p = spec.get("top_k"), spec.get("top_p")
    choice = Choice(spec["temperature"], top_k, None if top_k is None else top_p)
    gpt, params = model.gpt.clone(n_unmasked=0), model.params["transformer"]
    b, n = u.shape
    if "class_label" in case.inputs:
        labels = np.broadcast_to(case.inputs["class_label"], b)
        c = jnp.asarray(model.conditioner.encode(labels.tolist()))
    else:
        c = jnp.asarray(model.conditioner.encode_null(b))
    step = jax.jit(lambda params, tokens, cache: gpt.apply({"params": params}, tokens, cache=cache))
    token, cache, logits, kept, tokens = c, gpt.empty_cache(b), [], [], []
    for i in range(n):
        out, cache = step(params, token, cache)  # type: ignore[misc]
        logits.append(out[:, -1])
        kept.append(jnp.isfinite(choice.filtered(logits[-1])))
        token = choice(logits[-1], u[:, i])[:, None]
        tokens.append(token)
    sequence = jnp.concatenate(tokens, axis=1)
    scanned = jax.jit(lambda p, c: generate(gpt, p, c, n, uniforms=u, choice=choice).tokens)
    assert np.array_equal(scanned(params, c)[:, c.shape[1] :], sequence)
    codes = model.grid(sequence, *case_grid(model, n))
    presents = {
        name: jnp.stack([cache.k[:, :, i], cache.v[:, :, i]], axis=1)[:, :, :, :, None]
        for name, i in (("present_first", 0), ("present_last", n - 1))
    }
    return {
        "index_sample": sequence,
        "logits": jnp.stack(logits, axis=1),
        "kept": jnp.stack(kept, axis=1).astype(jnp.uint8),
        "n_kept": jnp.stack(kept, axis=1).sum(-1),
        "samples": nchw(jax.jit(lambda model, codes: model.decode(codes))(model, codes)),
        **presents,
    }


def case_grid(model: CodeTransformer, n: int) -> tuple[int, int]:
    """The codes (h, w) of a square picture."""
    side = round(n**0.5)
    assert side * side == n, model
    return side, side


def windows(case: Case) -> Results:
    """Sliding windows over a picture larger than the transformer's, or its lower half."""
    model = model_of(case)
    x = jnp.asarray(case.inputs["image"])
    encoded = encoded_of(case, model, len(x))
    c = jax.jit(model.condition)(model.params["conditioner"], encoded)
    z = jax.jit(lambda model, x: model.codes_of(x))(model, x)
    h, w = z.shape[1:]
    count = len(case.inputs["windows"])
    first = 0 if count == h * w else h * w // 2
    codes = z.reshape(len(z), -1).at[:, first:].set(0).reshape(z.shape)
    cells = sliding_cells((h, w), WINDOW, first, restart=True)
    assert np.array_equal(np.concatenate(cells, axis=1), case.inputs["windows"])
    choice = Choice(case.spec["temperature"], case.spec["top_k"])
    u = jnp.asarray(case.inputs["u"]).reshape(len(x), -1)
    run = jax.jit(
        lambda params, c, codes: (
            generate_windows(
                model.gpt, params, c, codes, WINDOW, cells, uniforms=u, choice=choice
            ).tokens
        )
    )
    grid = run(model.params["transformer"], c, codes)

    def given(codes: Any, place: int) -> np.ndarray:
        top, left = cells.corner[place]
        cut = [np.asarray(a)[:, top : top + 16, left : left + 16] for a in (c, codes)]
        return np.concatenate([a.reshape(len(x), -1) for a in cut], axis=1)[:, :-1]

    # At the last cell, all codes but that cell's are known.
    before = np.asarray(grid).copy()
    i, j = cells.place[-1]
    before[:, i, j] = np.asarray(codes)[:, i, j]
    return {
        "index_grid": grid,
        "c_indices": np.asarray(c).reshape(len(x), -1),
        "z_indices": np.asarray(z).reshape(len(x), -1),
        "decoded": nchw(jax.jit(lambda model, codes: model.decode(codes))(model, grid)),
        "window_tokens_first": given(codes, 0),
        "window_tokens_last": given(before, -1),
    }


CASES: Mapping[str, Callable[[Case], Results]] = {
    TARGET: net2net,
    f"scripts.sample_fast.sample_classconditional on {TARGET}": fast,
    f"scripts.sample_fast.sample_unconditional on {TARGET}": fast,
    f"scripts.make_samples.run_conditional on {TARGET}": windows,
}
