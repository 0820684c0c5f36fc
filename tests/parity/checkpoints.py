"""Checkpoint files as the original saved them: read by our reader, converted, run."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.convert.compvis.infer import Original
from ldm_jax.convert.compvis.reading import from_compvis, whole_of
from ldm_jax.convert.reader.reader import open_checkpoint
from ldm_jax.convert.tables import to_ours
from ldm_jax.convert.verify import condition_of, outputs_of
from ldm_jax.diffusion import objective as obj
from ldm_jax.diffusion.grids import step_grid
from ldm_jax.diffusion.guidance import classifier_free, predictor, unguided
from ldm_jax.diffusion.samplers import DDIM, sample
from ldm_jax.diffusion.schedule import Schedule
from ldm_jax.models.build import build
from ldm_jax.models.ldm import LatentDiffusion
from ldm_jax.models.vqgan import VQModel

from .golden import Case, NotYet, nchw

Results = dict[str, Any]


def latent_diffusion(case: Case) -> Results:
    """A file's model with its weights or their average: a call of each part, and sampling."""
    if (sampler := case.spec.get("sampler", "ddim")) != "ddim":
        raise NotYet(f"the sampler {sampler!r}")
    results, schedule = run(case, ema=False)
    if any(name.startswith("ema.") for name in case.expected):
        results |= {f"ema.{name}": value for name, value in run(case, ema=True)[0].items()}
    tables = {
        name: getattr(schedule, name) for name in ("betas", "alphas_cumprod", "posterior_variance")
    }
    tables["lvlb_weights"] = obj.elbo_weights(case.kwargs.get("parameterization", "eps"), schedule)
    return results | {f"buffer.{name}": table for name, table in tables.items()}


def run(case: Case, ema: bool) -> tuple[Results, Schedule]:
    """(results of the converted model, its schedule)."""
    converted = from_compvis(
        case.folder / case.spec["ckpt"], config=Original(case.cls, case.kwargs), ema=ema
    )
    config, params = (
        converted.config,
        jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), converted.params),
    )
    model = build(config, {"conditioner": {}, **params}, params["first_stage"])
    return outputs_of(config, params, case.inputs) | sampled(case, model), model.schedule


def sampled(case: Case, model: LatentDiffusion) -> Results:
    """DDIM without noise from x_T, guided as recorded, and the pictures of that."""
    grid = step_grid("uniform", case.spec["S"], model.schedule.timesteps, compat=True)
    nodes = DDIM().nodes(model.schedule, grid)
    nulls = {
        n.removeprefix("uncond_"): a for n, a in case.inputs.items() if n.startswith("uncond_")
    }

    @jax.jit
    def program(model: LatentDiffusion, x: jax.Array) -> Any:
        def apply(x: jax.Array, t: jax.Array, cond: Any) -> jax.Array:
            return model.apply(model.params, x, t, cond)

        cond, scale = condition_of(model, case.inputs), case.spec["unconditional_guidance_scale"]
        denoise = (
            classifier_free(apply, cond, condition_of(model, nulls), scale)
            if nulls
            else unguided(apply, cond)
        )
        predict, noise = (
            predictor(denoise, model.schedule, model.objective),
            jnp.zeros((len(grid), 1, *x.shape)),
        )
        z, _ = sample(DDIM(), predict, x, nodes, schedule=model.schedule, noise=noise)
        return z, model.first_stage.decode(z)

    z, decoded = program(model, case.image("x_T"))
    return {"samples": nchw(z), "decoded": nchw(decoded)}


def first_stage_params(case: Case) -> dict[str, Any]:
    """The parameters of a first stage in a separate file."""
    params = from_compvis(
        case.folder / case.spec["ckpt"], config=Original(case.cls, case.kwargs)
    ).params["first_stage"]
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)


def vqgan(case: Case) -> Results:
    """A whole first stage and its loss in evaluation, where the adversarial weight is 0."""
    path, original = case.folder / case.spec["ckpt"], Original(case.cls, case.kwargs)
    converted = from_compvis(path, config=original)
    results = outputs_of(converted.config, converted.params, case.inputs)
    with open_checkpoint(path) as checkpoint:
        whole = whole_of(original, checkpoint.tensors)
        losses = to_ours(whole.table, checkpoint.tensors, shapes=whole.shapes, where=case.name)[
            "losses"
        ]
    module, params, x = (
        whole.modules["first_stage"],
        converted.params["first_stage"],
        case.image("x"),
    )
    assert isinstance(module, VQModel)
    indices = case.inputs["random_indices"].reshape(1, *results["quant"].shape[2:])
    y = np.moveaxis(results["reconstruction"], 1, -1)
    logits = jax.jit(whole.modules["discriminator"].apply)(losses["discriminator"], y)
    distance = jax.jit(whole.modules["lpips"].apply)({"params": losses["lpips"]}, x, y)
    reconstruction, g_loss = np.abs(x - y).mean() + np.mean(distance), -np.mean(logits)
    total = reconstruction + results["emb_loss"]
    logged = {
        "total_loss": total,
        "quant_loss": results["emb_loss"],
        "nll_loss": reconstruction,
        "rec_loss": reconstruction,
        "p_loss": np.mean(distance),
        "d_weight": 0.0,
        "disc_factor": 1.0,
        "g_loss": g_loss,
    }
    return {
        **results,
        "decode_random_indices": nchw(
            module.apply({"params": params}, indices, method="decode_code")
        ),
        "disc_logits": nchw(logits),
        "lpips": np.asarray(distance)[:, None, None, None],
        "val_aeloss": total,
        **{f"val/{name}": value for name, value in logged.items()},
    }
