"""The embedders of sgm's GeneralConditioner, and the fields of our conditioner "sdxl"."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ldm_jax.conditioning.sdxl import NUMBERS
from ldm_jax.convert.compvis.encoders import clip_text_table, open_clip_table
from ldm_jax.convert.compvis.targets import pick_params
from ldm_jax.convert.tables import Table, under
from ldm_jax.errors import TargetError
from ldm_jax.models.clip import CLIPText

EMBEDDERS = "sgm.modules.encoders.modules"
CLIP, OPEN_CLIP, SCALARS = (
    f"{EMBEDDERS}.{name}"
    for name in ("FrozenCLIPEmbedder", "FrozenOpenCLIPEmbedder2", "ConcatTimestepEmbedderND")
)
GENERAL = "sgm.modules.GeneralConditioner"
# Key of the batch -> field of a request.
KEYS = {
    "original_size_as_tuple": "original_size",
    "crop_coords_top_left": "crop",
    "target_size_as_tuple": "target_size",
    "aesthetic_score": "aesthetic_score",
}
VIT_BIGG = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}
SIZES = """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    max_position_embeddings
"""
_TRAINING = "is_trainable ucg_rate legacy_ucg_value input_key input_keys target params"


class Embedders(NamedTuple):
    """What a conditioner consists of.

    Attributes:
      fields: The fields of our conditioner, without those of the towers.
      towers: {"clip_l", "clip_g"} -> the tower.
      places: {"clip_l", "clip_g"} -> its number among the embedders.
    """

    fields: dict[str, Any]
    towers: dict[str, CLIPText]
    places: dict[str, int]

    @property
    def table(self) -> Table:
        """The table of the towers; paths begin with their names."""
        table: Table = []
        for name, tower in self.towers.items():
            prefix = f"conditioner.embedders.{self.places[name]}."
            if name == "clip_l":
                inner = clip_text_table(tower, f"{prefix}transformer.text_model.")
            else:
                inner = open_clip_table(tower, f"{prefix}model.", 0)
            table += under((name,), inner)
        return table


def embedders_of(config: Mapping[str, Any]) -> Embedders:
    """Reads a ``conditioner_config``; raises TargetError where it is not that of SDXL."""
    if config.get("target") != GENERAL:
        raise TargetError(
            f"the conditioner {config.get('target')} is not supported, only {GENERAL}"
        )
    fields: dict[str, Any] = {}
    towers: dict[str, CLIPText] = {}
    places: dict[str, int] = {}
    vector: list[str] = []
    for i, model in enumerate(config["params"]["emb_models"]):
        target, params = model["target"], model.get("params") or {}
        pick_params(target, model, same="", ignored=_TRAINING)
        if target == SCALARS:
            name = KEYS.get(model.get("input_key", ""))
            if name is None or not towers:
                raise TargetError(
                    f"{target} of {model.get('input_key')!r} is not supported, only those of"
                    f" {', '.join(KEYS)} after the text"
                )
            dim = pick_params(target, params, same="outdim")["outdim"]
            if fields.setdefault("size_dim", dim) != dim:
                raise TargetError(f"{target}: outdim={dim} must be that of the others")
            vector.append(name)
            continue
        name = {CLIP: "clip_l", OPEN_CLIP: "clip_g"}.get(target)
        if name is None or name in towers or model.get("input_key") != "txt":
            raise TargetError(f"the embedder {target} is not supported at place {i}")
        if name == "clip_l" and towers:
            raise TargetError(f"{CLIP} must come before {OPEN_CLIP}")
        tower, layer = _clip(params) if name == "clip_l" else _open_clip(params)
        towers[name], places[name], fields[f"{name}_layer"] = tower, i, layer
    if "clip_g" not in towers:
        raise TargetError(f"the conditioner lacks {OPEN_CLIP}, which gives the pooled state")
    fields |= {"vector": vector, "zero_empty": "clip_l" in towers}
    return Embedders(fields, towers, places)


def _clip(params: Mapping[str, Any]) -> tuple[CLIPText, int]:
    same = f"{SIZES} layer layer_idx"
    fixed = {"max_length": 77, "version": "openai/clip-vit-large-patch14"}
    fixed |= {"always_return_pooled": False}
    given = pick_params(CLIP, params, same=same, ignored="device freeze", fixed=fixed)
    layer, index = given.pop("layer", "last"), given.pop("layer_idx", None)
    if layer != "hidden" or index is None:
        raise TargetError(f"{CLIP}: layer={layer!r} is not supported, only 'hidden' with layer_idx")
    tower = CLIPText(**given)
    count = tower.num_hidden_layers
    if not -count - 1 <= index <= count:
        raise TargetError(f"{CLIP}: layer_idx={index} is beyond its {count} layers")
    return tower, index if index < 0 else index - count - 1


def _open_clip(params: Mapping[str, Any]) -> tuple[CLIPText, int]:
    same = f"{SIZES} projection_dim layer"
    fixed = {"max_length": 77, "arch": "ViT-bigG-14", "legacy": False}
    # Without the pooled state there is no vector; "legacy" normalises the state, by default too.
    given = pick_params(
        OPEN_CLIP,
        {"legacy": True, "arch": "ViT-H-14", "always_return_pooled": False, **params},
        same=same,
        ignored="device freeze version",
        fixed=fixed | {"always_return_pooled": True},
    )
    layers = {"last": -1, "penultimate": -2}
    if (layer := given.pop("layer", "last")) not in layers:
        raise TargetError(
            f"{OPEN_CLIP}: layer={layer!r} is not supported, only {', '.join(layers)}"
        )
    return CLIPText(**{**VIT_BIGG, **given}, hidden_act="gelu"), layers[layer]


def sections_of(embedders: Embedders) -> dict[str, Any]:
    """Returns our "conditioner" section."""
    section: dict[str, Any] = {"kind": "sdxl"}
    for name, tower in embedders.towers.items():
        more = {"hidden_act": "gelu", "pad_token_id": 0} if name == "clip_g" else {}
        names = [*SIZES.split(), *(["projection_dim"] if name == "clip_g" else [])]
        section[name] = {"kind": "clip", **{n: getattr(tower, n) for n in names}, **more}
    return section | embedders.fields


def config_of_embedders(
    towers: Mapping[str, CLIPText],
    layers: Mapping[str, int],
    vector: Sequence[str],
    size_dim: int,
) -> dict[str, Any]:
    """Returns the ``conditioner_config`` of towers and numbers, the inverse of `embedders_of`."""
    models = []
    for name, tower in towers.items():
        usual: dict[str, Any] = VIT_BIGG if name == "clip_g" else {}
        names = [*SIZES.split(), *usual]
        sizes = {n: getattr(tower, n) for n in names}
        default = CLIPText(**usual)
        sizes = {n: value for n, value in sizes.items() if value != getattr(default, n)}
        params: dict[str, Any]
        if name == "clip_l":
            index = layers[name] + tower.num_hidden_layers + 1
            target, params = CLIP, {"layer": "hidden", "layer_idx": index}
        else:
            layer = {-1: "last", -2: "penultimate"}.get(layers[name])
            if layer is None:
                raise TargetError(f"the original cannot hold clip_g_layer={layers[name]}")
            target = OPEN_CLIP
            params = {"arch": "ViT-bigG-14", "version": "laion2b_s39b_b160k", "freeze": True}
            params |= {"layer": layer, "always_return_pooled": True, "legacy": False}
        models.append(
            {"is_trainable": False, "input_key": "txt", "target": target, "params": params | sizes}
        )
    keys = {field: key for key, field in KEYS.items()}
    models += [
        {
            "is_trainable": False,
            "input_key": keys[name],
            "target": SCALARS,
            "params": {"outdim": size_dim},
        }
        for name in vector
    ]
    return {"target": GENERAL, "params": {"emb_models": models}}


def numbers_in(vector: Sequence[str]) -> int:
    """Returns how many numbers the fields of a vector have."""
    return sum(NUMBERS[name] for name in vector)
