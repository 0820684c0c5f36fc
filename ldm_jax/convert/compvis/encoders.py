"""Name tables of what the original conditions on: BERT and CLIP, class labels, rescaled maps."""

import numpy as np

from ldm_jax.convert.compvis.blocks import Walk, cross_attention, feed_forward
from ldm_jax.convert.tables import (
    CONV1X1,
    DENSE,
    Entry,
    Path,
    Table,
    Unused,
    conv,
    dense,
    embedding,
    norm,
    unused,
)
from ldm_jax.models.bert import TransformerEncoder
from ldm_jax.models.clip import CLIPText, CLIPVision
from ldm_jax.models.embedders import ClassEmbedder, SpatialRescaler


def bert_table(model: TransformerEncoder, prefix: str = "cond_stage_model.transformer.") -> Table:
    """The x_transformer TransformerWrapper inside BERTEmbedder and TransformerEmbedder."""
    table: Table = [
        *embedding(f"{prefix}token_emb", ("token_emb",)),
        Entry(f"{prefix}pos_emb.emb.weight", ("pos_emb",)),
        *norm(f"{prefix}norm", ("norm",)),
    ]
    for i in range(model.depth):  # attention and feed-forward are layers of their own there
        attn, ff = f"{prefix}attn_layers.layers.{2 * i}", f"{prefix}attn_layers.layers.{2 * i + 1}"
        table += [
            *norm(f"{attn}.0", (f"attn_norm_{i}",)),
            *cross_attention(f"{attn}.1.", (f"attn_{i}",), out="to_out"),
        ]
        table += [
            *norm(f"{ff}.0", (f"ff_norm_{i}",)),
            *feed_forward(f"{ff}.1.", (f"ff_{i}",), glu=model.ff_glu),
        ]
    if model.with_logits:
        return [*table, *dense(f"{prefix}to_logits", ("to_logits",))]
    return [
        *table,
        unused(f"{prefix}to_logits.weight", model.vocab_size, model.dim),
        unused(f"{prefix}to_logits.bias", model.vocab_size),
    ]


def class_embedder_table(model: ClassEmbedder, prefix: str = "cond_stage_model.") -> Table:
    """ClassEmbedder."""
    return [*embedding(f"{prefix}embedding", ("embedding",))]


def rescaler_table(model: SpatialRescaler, prefix: str = "cond_stage_model.") -> Table:
    """SpatialRescaler, which has parameters only where it maps channels."""
    if model.out_channels is None:
        return []
    return [*dense(f"{prefix}channel_mapper", ("channel_mapper",), bias=model.bias, op=CONV1X1)]


def _position_ids(prefix: str, n: int) -> Unused:
    # Merges of models have rounded these counts; transformers no longer reads them.
    return Unused(f"{prefix}embeddings.position_ids", lambda: np.arange(n, dtype=np.int64)[None])


def _clip_layer(prefix: str, path: Path) -> Walk:
    for i in (1, 2):
        yield from norm(f"{prefix}layer_norm{i}", (*path, f"norm{i}"))
        yield from dense(f"{prefix}mlp.fc{i}", (*path, f"fc{i}"))
    for name in ("q", "k", "v", "out"):
        yield from dense(f"{prefix}self_attn.{name}_proj", (*path, name))


def _beside(prefix: str) -> str:
    """The prefix of what lies beside a tower: its own without the tower's name."""
    return prefix.removesuffix("text_model.").removesuffix("vision_model.")


def clip_text_table(
    model: CLIPText, prefix: str = "cond_stage_model.transformer.text_model."
) -> Table:
    """The text tower as transformers names it and Stable Diffusion v1 stores it."""
    n = model.max_position_embeddings
    table: Table = [
        *embedding(f"{prefix}embeddings.token_embedding", ("token_embedding",)),
        Entry(f"{prefix}embeddings.position_embedding.weight", ("position_embedding",)),
        _position_ids(prefix, n),
        *norm(f"{prefix}final_layer_norm", ("final_norm",)),
    ]
    for i in range(model.num_hidden_layers):
        table += _clip_layer(f"{prefix}encoder.layers.{i}.", (f"layers_{i}",))
    if model.projection_dim is not None:
        table += dense(f"{_beside(prefix)}text_projection", ("projection",), bias=False)
    return table


def resblocks(prefix: str, layers: int) -> Walk:
    """The layers of a tower as openai and open_clip name them, with q, k and v in one array."""
    for i in range(layers):
        source, ours = f"{prefix}transformer.resblocks.{i}", f"layers_{i}"
        for j in (1, 2):
            yield from norm(f"{source}.ln_{j}", (ours, f"norm{j}"))
        for j, x in enumerate(("q", "k", "v")):
            yield Entry(f"{source}.attn.in_proj_weight", (ours, x, "kernel"), DENSE, (j, 3))
            yield Entry(f"{source}.attn.in_proj_bias", (ours, x, "bias"), part=(j, 3))
        yield from dense(f"{source}.attn.out_proj", (ours, "out"))
        yield from dense(f"{source}.mlp.c_fc", (ours, "fc1"))
        yield from dense(f"{source}.mlp.c_proj", (ours, "fc2"))


def open_clip_table(model: CLIPText, prefix: str, unused_layers: int = 1) -> Table:
    """The text tower of open_clip, with q, k and v in one array, as Stable Diffusion 2.x stores it.

    Args:
      model: The tower without the layers that are not run.
      prefix: The prefix of the names.
      unused_layers: Layers that the original stores and does not run.

    The projection is stored as [width, dim]; it is unused where the tower has none.
    """
    c, hidden, n = model.hidden_size, model.intermediate_size, model.num_hidden_layers
    table: Table = [
        *embedding(f"{prefix}token_embedding", ("token_embedding",)),
        Entry(f"{prefix}positional_embedding", ("position_embedding",)),
        *norm(f"{prefix}ln_final", ("final_norm",)),
    ]
    table += resblocks(prefix, n)
    for i in range(n, n + unused_layers):
        source = f"{prefix}transformer.resblocks.{i}."
        shapes = {"ln_1": (c,), "ln_2": (c,), "mlp.c_fc": (hidden, c), "mlp.c_proj": (c, hidden)}
        for name, shape in (shapes | {"attn.out_proj": (c, c)}).items():
            table.append(unused(f"{source}{name}.weight", *shape))
            table.append(unused(f"{source}{name}.bias", shape[0]))
        table += [
            unused(f"{source}attn.in_proj_weight", 3 * c, c),
            unused(f"{source}attn.in_proj_bias", 3 * c),
        ]
    if model.projection_dim is None:
        table.append(unused(f"{prefix}text_projection", c, c))
    else:
        table.append(Entry(f"{prefix}text_projection", ("projection", "kernel")))
    return [*table, unused(f"{prefix}logit_scale")]


def clip_vision_table(model: CLIPVision, prefix: str = "vision_model.") -> Table:
    """The image tower as transformers names it."""
    places = (model.image_size // model.patch_size) ** 2 + 1
    table: Table = [
        Entry(f"{prefix}embeddings.class_embedding", ("class_embedding",)),
        *conv(f"{prefix}embeddings.patch_embedding", ("patch_embedding",), bias=False),
        Entry(f"{prefix}embeddings.position_embedding.weight", ("position_embedding",)),
        _position_ids(prefix, places),
        *norm(f"{prefix}pre_layrnorm", ("pre_norm",)),  # the name is misspelt there
        *norm(f"{prefix}post_layernorm", ("post_norm",)),
    ]
    for i in range(model.num_hidden_layers):
        table += _clip_layer(f"{prefix}encoder.layers.{i}.", (f"layers_{i}",))
    if model.projection_dim is not None:
        table += dense(f"{_beside(prefix)}visual_projection", ("projection",), bias=False)
    return table
