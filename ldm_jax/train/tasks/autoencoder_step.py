"""The first stage: an autoencoder, KL or VQ, learns to reconstruct, and where it has an adversary to deceive it as well."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ldm_jax.models.autoencoder import AutoencoderKL, init_variables, latent_shape
from ldm_jax.models.ldm import apply, to_float
from ldm_jax.models.quantize import perplexity, share_of
from ldm_jax.models.vqgan import VQModelInterface
from ldm_jax.train.state import (
    TrainState,
    descend,
    extra_of,
    in_parts,
    normal_rows,
    over_devices,
    row_keys,
)
from ldm_jax.train.tasks.adversarial import (
    Adversary,
    discriminator_gradients,
    generator_gradients,
    judge,
    make_nll,
    update_discriminator,
)
from ldm_jax.train.tasks.codebook import USED, enough, restart_codes, spread, used

FirstStageModule = AutoencoderKL | VQModelInterface
Perceptual = Callable[
    [Any, jax.Array, jax.Array], jax.Array
]  # (its parameters, a, b [b, H, W, 3]) -> distance [b]

# Purposes of a row's random numbers: each key is used once. The two passes of updates="parity" draw apart, as the original's do.
GENERATOR, DISCRIMINATOR, CODES = range(3)
OF_STEP = (
    2**31
)  # what the whole batch draws at a step, apart from its rows, which no batch has so many of
RECENT = 0.99  # decay of the guard's average of the reconstruction loss


class Aux(NamedTuple):
    """What a pass leaves beside its loss; the last two of VQ alone: ``share`` [n_embed] of each code in the batch, ``candidates`` [b, k, c] to
    become codes.
    """

    collections: dict[str, Any]
    share: jax.Array | None = None
    candidates: jax.Array | None = None


def temperature(config: Any, step: jax.Array) -> jax.Array:
    """The Gumbel quantiser's: half a cosine from ``temperature`` to ``temperature_final`` over ``temperature_steps``, as in taming-transformers."""
    first, last = config.temperature, config.temperature_final
    at = jnp.minimum(step / max(config.temperature_steps, 1), 1.0)
    return last + 0.5 * (first - last) * (1.0 + jnp.cos(jnp.pi * at))


def make_forward(
    module: FirstStageModule, config: Any, seed: int
) -> Callable[..., tuple[Any, Aux]]:
    """``forward(params, collections, batch, step, purpose, train) -> ((y [b, H, W, c], penalty []), Aux)``.

    The penalty is the KL divergence, summed over a latent and averaged over the batch, or the quantiser's loss. Only in ``train`` is anything drawn.
    """

    def kl(
        params: Any, collections: Any, batch: Any, step: jax.Array, purpose: int, train: bool
    ) -> tuple[Any, Aux]:
        assert isinstance(module, AutoencoderKL)
        x = to_float(batch["image"])
        keys = row_keys(seed, step, batch["row"])
        noise = (
            normal_rows(keys, purpose, latent_shape(module, x.shape[1], x.shape[2]))
            if train
            else None
        )
        y, posterior = apply(
            module, params, x, noise, train=train, rngs=_dropout(seed, step, purpose, train)
        )
        return (y, posterior.kl().mean()), Aux(collections)

    def vq(
        params: Any, collections: Any, batch: Any, step: jax.Array, purpose: int, train: bool
    ) -> tuple[Any, Aux]:
        assert not isinstance(module, AutoencoderKL)
        x = to_float(batch["image"])
        keys = row_keys(seed, step, batch["row"])
        height, width, _ = latent_shape(module, x.shape[1], x.shape[2])
        n = module.make_quantizer().re_embed
        noise: dict[str, Any] = {}
        if module.quantizer == "gumbel" and train:
            shape = (height, width, n)
            noise["gumbels"] = jax.vmap(
                lambda key: jax.random.gumbel(jax.random.fold_in(key, purpose), shape)
            )(keys)
            noise["temperature"] = temperature(config, step)
        (y, code, h), written = module.apply(
            {"params": params, **collections},
            x,
            train,
            **noise,
            method="reconstruct",
            mutable=list(collections) if train else [],
            rngs=_dropout(seed, step, purpose, train),
        )
        _, count, c = candidates_shape(module, x)
        places = jax.vmap(
            lambda key: spread(jax.random.fold_in(key, CODES), count, height * width)
        )(keys)
        candidates = jax.vmap(lambda h, at: h[at])(
            jax.lax.stop_gradient(h).reshape(len(x), -1, c), places
        )
        return (y, code.loss), Aux(
            {**collections, **written}, share_of(code.indices, n), candidates
        )

    return kl if isinstance(module, AutoencoderKL) else vq


def candidates_shape(module: VQModelInterface, images: jax.Array) -> tuple[int, int, int]:
    """[b, k, c] of the encodings of ``images`` [b, H, W, 3], a device's part of a batch under pmap, that may become codes."""
    height, width, c = latent_shape(module, *images.shape[1:3])
    devices = 1 if module.axis_name is None else jax.lax.psum(1, module.axis_name)
    return (
        len(images),
        enough(module.make_quantizer().re_embed, height * width, len(images) * devices),
        c,
    )


def _dropout(seed: int, step: jax.Array, purpose: int, train: bool) -> dict[str, jax.Array] | None:
    key = jax.random.fold_in(jax.random.key(seed), step)
    return (
        {"dropout": key if purpose == GENERATOR else jax.random.fold_in(key, OF_STEP + purpose)}
        if train
        else None
    )


def nll_of(
    module: FirstStageModule, config: Any, x: jax.Array, frozen: Any, perceptual: Perceptual | None
) -> Any:
    """The reconstruction loss against x; see `make_nll`."""
    distance = None if perceptual is None else lambda a, b: perceptual(frozen["perceptual"], a, b)
    return make_nll(
        x, config.kind, config.perceptual_weight, distance, isinstance(module, AutoencoderKL)
    )


def penalty_of(module: FirstStageModule, config: Any) -> tuple[str, float]:
    """The penalty's name among the metrics, and its weight."""
    return (
        ("kl_loss", config.kl_weight)
        if isinstance(module, AutoencoderKL)
        else ("quant_loss", config.codebook_weight)
    )


def last_layer(grads: Any) -> jax.Array:
    """The decoder's last kernel, where the original measures d_weight."""
    return grads["decoder"]["conv_out"]["kernel"]


def code_metrics(share: jax.Array) -> dict[str, jax.Array]:
    """As the original logs them, of one batch's ``share`` [n_embed]."""
    return {
        "perplexity": perplexity(share),
        "cluster_usage": jnp.sum(share > 0).astype(jnp.float32),
    }


def evaluate(
    module: FirstStageModule,
    config: Any,
    perceptual: Perceptual | None,
    variables: Any,
    frozen: Any,
    batch: Any,
) -> dict[str, jax.Array]:
    """Metrics of a batch from all the module's collections: the loss without an adversary, and PSNR in dB. Nothing is drawn: KL takes the mode,
    Gumbel the likeliest code.
    """
    collections = {name: part for name, part in variables.items() if name != "params"}
    forward = make_forward(module, config, 0)
    (y, penalty), aux = forward(
        variables["params"], collections, batch, jnp.int32(0), GENERATOR, False
    )
    x = to_float(batch["image"])
    name, weight = penalty_of(module, config)
    logvar = jnp.asarray(variables["params"].get("logvar", config.logvar_init), jnp.float32)
    nll, metrics = nll_of(module, config, x, frozen, perceptual)(y, logvar)
    # Of pixels in [0, 1]: a range of 2 has 4 times the squared error.
    error = jnp.square(x - jnp.clip(y, -1, 1)).mean((1, 2, 3)) / 4
    metrics |= {
        name: penalty,
        "loss": nll + weight * penalty,
        "psnr": -10 * jnp.log10(error + 1e-10).mean(),
    }
    return metrics if aux.share is None else metrics | code_metrics(aux.share)


def make_extra(
    module: FirstStageModule,
    key: jax.Array,
    *,
    adversary: Adversary | None = None,
    disc_tx: optax.GradientTransformation | None = None,
    guard: bool = False,
    new_codes: bool = False,
) -> dict[str, Any]:
    """What training carries beside parameters: "discriminator", "collections" (an averaged codebook), "usage" of codes, "guard". ``new_codes`` are
    to start on encodings of the first batch.
    """
    extra: dict[str, Any] = {}
    if not isinstance(module, AutoencoderKL):
        collections = {
            name: part for name, part in init_variables(module, key).items() if name != "params"
        }
        extra |= {"collections": collections} if collections else {}
        extra["usage"] = (jnp.zeros if new_codes else jnp.ones)(module.make_quantizer().re_embed)
    if adversary is not None:
        assert disc_tx is not None
        side = 64  # any that is large enough: the parameters' shapes do not depend on it
        variables: Any = adversary.module.init(
            jax.random.fold_in(key, 1), jnp.zeros((1, side, side, module.out_ch))
        )
        extra["discriminator"] = {**variables, "opt_state": disc_tx.init(variables["params"])}
    if guard:
        extra["guard"] = {
            "recent": jnp.zeros(()),
            # Without a dtype it is a weak one, and the second step would be compiled anew.
            "lowest": jnp.full((), jnp.inf, jnp.float32),
            "rollbacks": jnp.zeros((), jnp.int32),
        }
    return extra


def watched(guard: dict[str, jax.Array], loss: jax.Array, step: jax.Array) -> dict[str, jax.Array]:
    """The guard after a step: the moving average of the reconstruction loss, and its lowest since it is one: at first it is the mean, and the mean of
    a few batches may be low by chance.
    """
    count = step + 1.0
    recent = guard["recent"] + jnp.maximum(1 - RECENT, 1 / count) * (loss - guard["recent"])
    settled = count * (1 - RECENT) > 0.99
    return guard | {
        "recent": recent,
        "lowest": jnp.where(settled, jnp.minimum(guard["lowest"], recent), guard["lowest"]),
    }


def make_step(
    module: FirstStageModule,
    tx: optax.GradientTransformation,
    config: Any,
    *,
    seed: int,
    ema: float,
    parts: int,
    perceptual: Perceptual | None = None,
    adversary: Adversary | None = None,
    disc_tx: optax.GradientTransformation | None = None,
    fused: bool = True,
) -> Callable[..., tuple[TrainState, dict]]:
    """``step(state, frozen, batch, *, axis_name=None) -> (state, metrics)``, pure.

    ``frozen`` holds the perceptual network's parameters under "perceptual"; ``batch`` "image" uint8 [b, H, W, 3] and "row" int32 [b]; the state's
    ``extra`` is of `make_extra`. With an ``adversary`` both are updated, each by its optimiser. As in the original, the autoencoder is updated
    first and run again, with new noise, for the discriminator; ``fused``, one run serves both, and the discriminator judges each side once.
    """
    name, weight = penalty_of(module, config)

    def step(
        state: TrainState, frozen: Any, batch: Any, *, axis_name: str | None = None
    ) -> tuple[TrainState, dict]:
        extra: dict[str, Any] = extra_of(state)
        at = state.step
        rollbacks = extra["guard"]["rollbacks"] if "guard" in extra else 0
        critic = None if adversary is None else adversary.on_axis(axis_name)
        net = module if isinstance(module, AutoencoderKL) else module.clone(axis_name=axis_name)
        forward = make_forward(net, config, seed)

        def generator(carry: dict[str, Any], piece: Any) -> tuple[dict[str, Any], dict[str, Any]]:
            x = to_float(piece["image"])

            def run(params: Any) -> Any:
                (y, penalty), aux = forward(
                    params, carry["collections"], piece, at, GENERATOR, True
                )
                return (y, penalty), (penalty, aux)

            made = generator_gradients(
                run,
                state.params,
                nll_of(module, config, x, frozen, perceptual),
                penalty_weight=weight,
                logvar=config.logvar_init,
                last_layer=last_layer,
                adversary=critic,
                variables=carry["discriminator"],
                step=at,
                rollbacks=rollbacks,
                axis_name=axis_name,
            )
            penalty, aux = made.aux
            results = {
                "grads": made.grads,
                "metrics": {name: penalty, **made.metrics},
                "share": aux.share,
            }
            carry = carry | {"collections": aux.collections, "candidates": aux.candidates}
            if critic is not None and made.fake is not None:
                carry["discriminator"] = made.fake.variables
                if fused:
                    real = judge(critic.module, made.fake.variables, x)
                    carry["discriminator"] = real.variables
                    results["disc"] = discriminator_gradients(critic, real, made.fake, at)
            return carry, results

        def discriminator(
            params: Any, carry: dict[str, Any], piece: Any
        ) -> tuple[dict[str, Any], Any]:
            assert critic is not None
            (y, _), aux = forward(params, carry["collections"], piece, at, DISCRIMINATOR, True)
            real = judge(critic.module, carry["discriminator"], to_float(piece["image"]))
            fake = judge(critic.module, real.variables, y)
            carry = carry | {"collections": aux.collections, "discriminator": fake.variables}
            return carry, discriminator_gradients(critic, real, fake, at)

        # ---------------------------------------------------------------------------------------------------- the generator
        carry: dict[str, Any] = {
            "collections": extra.get("collections", {}),
            "discriminator": None,
            "candidates": None,
        }
        if critic is not None:
            carry["discriminator"] = {
                key: extra["discriminator"][key] for key in ("params", "batch_stats")
            }
        if "usage" in extra:
            assert not isinstance(net, AutoencoderKL)
            part = batch["image"][: len(batch["row"]) // parts]
            carry["candidates"] = jnp.zeros(candidates_shape(net, part))
        carry, results = in_parts(generator, carry, batch, parts)
        results = over_devices(results, axis_name)
        state, metrics = descend(state, results["grads"], results["metrics"], tx, ema)

        # ------------------------------------------------------------------------------------------------ the discriminator
        if critic is not None:
            assert disc_tx is not None
            if not fused:
                carry, judged = in_parts(
                    lambda c, piece: discriminator(state.params, c, piece), carry, batch, parts
                )
                results["disc"] = over_devices(judged, axis_name)
            grads, of_both = results["disc"]
            updated, norm = update_discriminator(
                {**extra["discriminator"], **carry["discriminator"]}, grads, disc_tx
            )
            extra = {**extra, "discriminator": updated}
            metrics |= of_both | norm

        # --------------------------------------------------------------------------------------------- the codes, the guard
        if carry["collections"]:
            extra = {**extra, "collections": carry["collections"]}
        if "usage" in extra:
            usage = used(extra["usage"], results["share"])
            extra = {**extra, "usage": usage}
            metrics |= code_metrics(results["share"]) | {"codebook_use": jnp.mean(usage > USED)}
            if config.restart_codes:
                key = jax.random.fold_in(
                    jax.random.fold_in(jax.random.key(seed), at), OF_STEP + CODES
                )
                state, extra, count = restart_codes(
                    state, extra, carry["candidates"], key, axis_name
                )
                metrics["restarted"] = count
        if "guard" in extra:
            guard = watched(extra["guard"], metrics["rec_loss"], at)
            extra, metrics["rise"] = {**extra, "guard": guard}, guard["recent"] / guard["lowest"]
        return (dataclasses.replace(state, extra=extra) if extra else state), metrics

    return step
