"""Name tables of the original's networks that no published model uses."""

from ldm_jax.convert.compvis.autoencoders import (
    decoder_table,
    encoder_table,
    kl_table,
    vqmodel_table,
)
from ldm_jax.convert.compvis.blocks import (
    Walk,
    attn_block,
    cross_attention,
    feed_forward,
    resnet_block,
)
from ldm_jax.convert.tables import (
    CONV1X1,
    Entry,
    Table,
    conv,
    dense,
    embedding,
    norm,
    under,
    unused,
)
from ldm_jax.models.rescale import (
    FirstStagePostProcessor,
    LatentRescaler,
    MergedRescaleDecoder,
    MergedRescaleEncoder,
)
from ldm_jax.models.vqgan import VQModel
from ldm_jax.models.x_transformer import TransformerWrapper


def transformer_wrapper_table(model: TransformerWrapper, prefix: str = "") -> Table:
    """TransformerWrapper around an Encoder; attention and feed-forward are layers of their own."""

    def scale(source: str, path: str) -> Walk:
        if model.use_scalenorm:
            yield Entry(f"{source}.g", (path, "g"))
        else:
            yield from norm(source, (path,))

    table: Table = [*embedding(f"{prefix}token_emb", ("token_emb",))]
    table += norm(f"{prefix}norm", ("norm",))
    if model.use_pos_emb:
        table.append(Entry(f"{prefix}pos_emb.emb.weight", ("pos_emb",)))
    if (model.emb_dim or model.dim) != model.dim:
        table += dense(f"{prefix}project_emb", ("project_emb",))
    if model.num_memory_tokens:
        table.append(Entry(f"{prefix}memory_tokens", ("memory_tokens",)))
    for i in range(model.depth):
        attn, ff = (f"{prefix}attn_layers.layers.{2 * i + j}" for j in (0, 1))
        table += scale(f"{attn}.0", f"attn_norm_{i}")
        table += cross_attention(f"{attn}.1.", (f"attn_{i}",), out="to_out")
        if model.attn_talking_heads:
            for name in ("pre_softmax_proj", "post_softmax_proj"):
                table.append(Entry(f"{attn}.1.{name}", (f"attn_{i}", name)))
        table += scale(f"{ff}.0", f"ff_norm_{i}")
        table += feed_forward(f"{ff}.1.", (f"ff_{i}",), glu=model.ff_glu)
    if not model.tie_embedding:
        table += dense(f"{prefix}to_logits", ("to_logits",))
    return table


def latent_rescaler_table(model: LatentRescaler, prefix: str = "") -> Table:
    """LatentRescaler."""
    table: Table = [
        *conv(f"{prefix}conv_in", ("conv_in",)),
        *attn_block(f"{prefix}attn.", ("attn",)),
        *dense(f"{prefix}conv_out", ("conv_out",), op=CONV1X1),
    ]
    for name in ("res_block1", "res_block2"):
        for i in range(model.depth):
            table += resnet_block(f"{prefix}{name}.{i}.", (f"{name}_{i}",), skip=False)
    return table


def _rescaler(model: MergedRescaleEncoder | MergedRescaleDecoder, prefix: str) -> Table:
    rescaler = LatentRescaler(1.0, 0, 0, 0, model.rescale_module_depth)
    return under(("rescaler",), latent_rescaler_table(rescaler, f"{prefix}rescaler."))


def rescale_encoder_table(model: MergedRescaleEncoder, prefix: str = "") -> Table:
    """MergedRescaleEncoder."""
    encoder = model.bind({}).encoder
    return [*encoder_table(encoder, f"{prefix}encoder.", ("encoder",)), *_rescaler(model, prefix)]


def rescale_decoder_table(model: MergedRescaleDecoder, prefix: str = "") -> Table:
    """MergedRescaleDecoder."""
    decoder = model.bind({}).decoder
    return [*decoder_table(decoder, f"{prefix}decoder.", ("decoder",)), *_rescaler(model, prefix)]


def post_processor_table(model: FirstStagePostProcessor, prefix: str = "") -> Table:
    """FirstStagePostProcessor, with the first stage that it holds."""
    inner, at = model.pretrained, f"{prefix}pretrained_model."
    stage = vqmodel_table(inner, at) if isinstance(inner, VQModel) else kl_table(inner, at)  # type: ignore[arg-type]
    width = model.n_channels or inner.ch
    table: Table = [
        *under(("pretrained_model",), stage),
        *norm(f"{prefix}proj_norm", ("proj_norm",)),
        *conv(f"{prefix}proj", ("proj",)),
    ]
    before = width
    for i, mult in enumerate(model.ch_mult):
        source, channels = f"{prefix}model.{i}.", mult * width
        table += resnet_block(source, (f"model_{i}",), skip=before != channels)
        # Of a timestep, which it never gets.
        table.append(unused(f"{source}temb_proj.weight", channels, 512))
        table.append(unused(f"{source}temb_proj.bias", channels))
        before = channels
    return table
