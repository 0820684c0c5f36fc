"""LoRA, textual inversion and ControlNet files: what they say, and damaged or hostile ones."""

import json
import random
from pathlib import Path

import jax
import numpy as np
import pytest
from hostile import CANARY, RUN, archive, call, mapping, name, storage, tensor, text
from mutations import mutate
from safetensors.numpy import save, save_file

from ldm_jax.conditioning import make_conditioner
from ldm_jax.convert.compvis.networks import param_shapes, table_of
from ldm_jax.convert.controlnet import read_controlnet
from ldm_jax.convert.diffusers.tables import TABLES
from ldm_jax.convert.embedding import add_embeddings, read_embedding, split_word
from ldm_jax.convert.lora import merge_lora
from ldm_jax.convert.tables import flatten, to_theirs
from ldm_jax.errors import ConversionError, LdmJaxError, TargetError
from ldm_jax.models.controlnet import ControlNet
from ldm_jax.models.unet import FIELDS, UNet

pytestmark = pytest.mark.fast

UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "channel_mult": (1,),
    "num_res_blocks": 1,
    "attention_resolutions": (1,),
    "num_heads": 2,
    "use_spatial_transformer": True,
    "context_dim": 8,
}
TOWER = {
    "kind": "clip",
    "hidden_size": 4,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
}
CONFIG = {"kind": "latent_diffusion", "unet": UNET, "conditioner": TOWER}


@pytest.fixture(scope="module")
def params():
    """Parameters of zeros, without memory."""

    def zeros(tree):
        return {
            key: zeros(value)
            if isinstance(value, dict)
            else np.broadcast_to(np.float32(0), value.shape)
            for key, value in tree.items()
        }

    tower = make_conditioner(TOWER, np.float32).towers[""].module
    return {"unet": zeros(param_shapes(UNet(**UNET))), "conditioner": zeros(param_shapes(tower))}


ATTENTION = "down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
LORA = {
    f"lora_unet_{ATTENTION}.lora_up.weight": (32, 2),
    f"lora_unet_{ATTENTION}.lora_down.weight": (2, 8),
    f"lora_unet_{ATTENTION}.alpha": (),
    "lora_unet_down_blocks_0_resnets_0_conv1.hada_w1_a": (32, 2),
    "lora_unet_down_blocks_0_resnets_0_conv1.hada_w1_b": (2, 288),
    "lora_unet_down_blocks_0_resnets_0_conv1.hada_w2_a": (32, 2),
    "lora_unet_down_blocks_0_resnets_0_conv1.hada_w2_b": (2, 288),
    "lora_unet_mid_block_attentions_0_proj_in.lokr_w1": (4, 4),
    "lora_unet_mid_block_attentions_0_proj_in.lokr_w2_a": (8, 2),
    "lora_unet_mid_block_attentions_0_proj_in.lokr_w2_b": (2, 8),
    "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": (8, 1),
    "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (1, 4),
    "lora_te_text_model_encoder_layers_0_mlp_fc1.dora_scale": (8, 1),
}


def ones(shapes):
    return {key: np.ones(shape, np.float32) for key, shape in shapes.items()}


def embedding_pt(**more: bytes) -> bytes:
    """A .pt of A1111's web UI with two vectors of four numbers."""
    vectors = tensor(storage(numel=8), shape=(2, 4), strides=(4, 1))
    content = {"string_to_param": mapping(**{"*": vectors}), "name": text("sks"), **more}
    return archive(mapping(**content), {"0": np.arange(8, dtype="<f4").tobytes()})


def older_embedding_pt() -> bytes:
    """The same of older versions, whose vectors are parameters in a ParameterDict."""
    vectors = tensor(storage(numel=8), shape=(2, 4), strides=(4, 1))
    parameter = call(name("torch._utils", "_rebuild_parameter"), vectors, b"\x88", b"}")
    ordered = call(name("collections", "OrderedDict"))
    filled = ordered + b"(" + text("*") + parameter + b"u"
    made = name("torch.nn.modules.container", "ParameterDict") + b")\x81"
    state = b"}(" + text("_parameters") + filled + text("training") + b"\x88" + b"u"
    whole = mapping(string_to_param=made + state + b"b", name=text("old"))
    return archive(whole, {"0": np.arange(8, dtype="<f4").tobytes()})


# ------------------------------------------------------------------------------ textual inversion


def test_the_word_and_its_vectors(tmp_path):
    (tmp_path / "a.pt").write_bytes(embedding_pt())
    (tmp_path / "older.pt").write_bytes(older_embedding_pt())
    save_file({"<toy>": np.ones(4, np.float32)}, tmp_path / "b.safetensors")
    save_file({"emb_params": np.ones((2, 4), np.float16)}, tmp_path / "face.safetensors")
    both = {"clip_l": np.ones((2, 4), np.float32), "clip_g": np.ones((2, 6), np.float32)}
    save_file(both, tmp_path / "xl.safetensors")
    found = {file.name: read_embedding(file) for file in sorted(tmp_path.iterdir())}
    assert found["a.pt"].tokens == ("sks", "sks_1")
    np.testing.assert_array_equal(found["a.pt"].vectors[""], np.arange(8.0).reshape(2, 4))
    assert found["older.pt"].word == "old"
    np.testing.assert_array_equal(found["older.pt"].vectors[""], found["a.pt"].vectors[""])
    assert found["b.safetensors"].tokens == ("<toy>",)
    assert found["face.safetensors"].word == "face"
    assert found["face.safetensors"].vectors[""].dtype == np.float32
    assert found["xl.safetensors"].vectors.keys() == {"clip_l", "clip_g"}
    assert read_embedding(tmp_path / "a.pt", "mine").word == "mine"
    assert split_word("mine=a.pt") == ("a.pt", "mine")
    assert split_word("a.pt") == ("a.pt", None)


def test_a_word_is_one_of_the_vocabulary(params, tmp_path):
    (tmp_path / "a.pt").write_bytes(embedding_pt())
    save_file({"<TOY>": np.full(4, 7, np.float32)}, tmp_path / "b.safetensors")
    words = [read_embedding(tmp_path / "a.pt"), read_embedding(tmp_path / "b.safetensors")]
    config, new = add_embeddings(CONFIG, params, words)
    assert config["conditioner"]["added_tokens"] == ["sks", "sks_1", "<TOY>"]
    assert config["conditioner"]["vocab_size"] == 49411
    assert config["conditioner"]["eos_token_id"] == 49407
    table = new["conditioner"]["token_embedding"]["embedding"]
    np.testing.assert_array_equal(table[49408:], [[0, 1, 2, 3], [4, 5, 6, 7], [7, 7, 7, 7]])
    assert CONFIG["conditioner"] == TOWER
    text = make_conditioner(config["conditioner"], np.float32)
    row = text.encode(["a Sks, <toy>"])[0]
    cat, comma = text.encode(["a ,"])[0][1:3]
    assert row[:8].tolist() == [49406, cat, 49408, 49409, comma, 49410, 49407, 49407]


@pytest.mark.parametrize(
    ("arrays", "word", "message"),
    [
        ({"<x>": np.ones((2, 5), "f4")}, None, "another base model: its vectors have 5 entries"),
        (
            {"clip_l": np.ones((2, 4), "f4"), "clip_g": np.ones((2, 6), "f4")},
            None,
            "it is for clip",
        ),
        ({"<x>": np.ones((2, 4), "i4")}, None, "no floats"),
        ({"<x>": np.ones((76, 4), "f4")}, None, "1 to 75 vectors"),
        ({"<x>": np.ones((2, 4, 1), "f4")}, None, "no textual inversion"),
        ({"a.b": np.ones(4, "f4"), "c": np.ones(4, "f4")}, None, "holds 2 arrays"),
        ({"<x>": np.full((2, 4), np.nan, "f4")}, None, "NaN"),
        ({"two words": np.ones(4, "f4")}, None, "WORD=FILE"),
        ({"<x>": np.ones(4, "f4")}, "a", "in the vocabulary already"),
    ],
)
def test_an_embedding_that_does_not_fit_is_named(params, tmp_path, arrays, word, message):
    save_file(arrays, tmp_path / "e.safetensors")
    with pytest.raises(LdmJaxError, match=message):
        add_embeddings(CONFIG, params, [read_embedding(tmp_path / "e.safetensors", word)])


def test_a_model_without_a_text_encoder_takes_no_words(tmp_path):
    save_file({"<x>": np.ones(4, "f4")}, tmp_path / "e.safetensors")
    word = read_embedding(tmp_path / "e.safetensors")
    with pytest.raises(TargetError, match="needs a model with a text encoder"):
        add_embeddings({"conditioner": {"kind": "none"}}, {"conditioner": {}}, [word])


def test_the_bert_encoder_takes_words(tmp_path):
    save_file({"<x>": np.full((2, 4), 7, "f4")}, tmp_path / "e.safetensors")
    word = read_embedding(tmp_path / "e.safetensors")
    bert = {"kind": "bert", "dim": 4, "depth": 1, "max_seq_len": 8}
    table = np.zeros((30522, 4), np.float32)
    params = {"conditioner": {"token_emb": {"embedding": table}}}
    config, new = add_embeddings({"conditioner": bert}, params, [word])
    assert config["conditioner"]["vocab_size"] == 30524
    assert "eos_token_id" not in config["conditioner"]
    assert (new["conditioner"]["token_emb"]["embedding"][30522:] == 7).all()
    row = make_conditioner(config["conditioner"], np.float32).encode(["a <X> b"])[0].tolist()
    assert row[2:4] == [30522, 30523]
    assert row[:2] + row[4:] == make_conditioner(bert, np.float32).encode(["a b"])[0].tolist()[:6]


# ------------------------------------------------------------------------------------------- LoRA


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"lora_unet_{ATTENTION}.lora_down.weight": (0, 8)}, "other shapes"),
        ({f"lora_unet_{ATTENTION}.lora_down.weight": (3, 8)}, "other shapes"),
        ({f"lora_unet_{ATTENTION}.alpha": (2,)}, "other shapes"),
        # The product would take 40 GB.
        (
            {
                f"lora_unet_{ATTENTION}.lora_up.weight": (100_000, 1),
                f"lora_unet_{ATTENTION}.lora_down.weight": (1, 100_000),
            },
            "other shapes",
        ),
        ({"lora_unet_mid_block_attentions_0_proj_in.lokr_w1": (400, 400)}, "other shapes"),
        ({"lora_te_text_model_encoder_layers_0_mlp_fc1.dora_scale": (3, 1)}, "other shapes"),
        ({f"lora_unet_{ATTENTION}.no_such_role": (3, 1)}, "no_such_role"),
    ],
)
def test_a_layer_that_does_not_fit_is_named(params, tmp_path, changes, message):
    save_file(ones(LORA), tmp_path / "good.safetensors")
    merged = flatten(merge_lora(CONFIG, params, tmp_path / "good.safetensors", 0.5)["unet"])
    changed = {path[0]: leaf.max() for path, leaf in merged.items() if leaf.any()}
    # (1 1 + 1 1) 0.5 / 2; (2 2) (2 2) 0.5; 1 (1 + 1) 0.5, with an alpha of 1 or none.
    assert changed == {"input_blocks_1_1": 0.5, "input_blocks_1_0": 2.0, "middle_block_1": 1.0}
    save_file(ones(LORA | changes), tmp_path / "bad.safetensors")
    with pytest.raises((TargetError, ConversionError), match=message):
        merge_lora(CONFIG, params, tmp_path / "bad.safetensors", 0.5)


# ---------------------------------------------------------------------------------- hostile files


def test_mutated_files_are_read_or_refused_by_one_error(params, tmp_path):
    """Nothing is run, and every refusal is an error of this package."""
    rng, canary = random.Random(0), Path(CANARY)
    canary.unlink(missing_ok=True)
    good = [
        save(ones(LORA), metadata={"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 2})}),
        save({"<x>": np.ones((2, 4), np.float32)}),
        embedding_pt(),
        older_embedding_pt(),
        embedding_pt(name=call(*RUN)),
    ]
    used, refusals = 0, []
    for i in range(150):
        file = tmp_path / "mutant.bin"
        file.write_bytes(mutate(good[i % len(good)], rng.choice(good), rng))
        for use in (
            lambda file: merge_lora(CONFIG, params, file),
            lambda file: add_embeddings(CONFIG, params, [read_embedding(file)]),
        ):
            try:
                use(file)
                used += 1
            except LdmJaxError as error:
                refusals.append(str(error).replace("\n", ""))
    assert used
    assert refusals
    assert all(text.isprintable() for text in refusals)
    assert not canary.exists()


def test_mutated_controlnets_are_read_or_refused_by_one_error(tmp_path):
    unet = UNet(**UNET)
    net = ControlNet(**{name: getattr(unet, name) for name in FIELDS})
    zeros = jax.tree.map(lambda s: np.broadcast_to(np.float16(0), s.shape), param_shapes(net))
    good = [
        save(to_theirs(table_of(net, "control_model."), zeros)),
        save(to_theirs(TABLES[ControlNet](net), zeros)),
    ]
    file = tmp_path / "net.safetensors"
    for data in good:
        file.write_bytes(data)
        assert read_controlnet(file, unet)[0] == net
    rng, refusals = random.Random(1), []
    for i in range(24):
        # Half of the damage is done to the header, which is a small part of the file.
        data, other = good[i % 2], good[(i + 1) % 2]
        cut = 40_000 if i % 4 < 2 else len(data)
        file.write_bytes(mutate(data[:cut], other[:cut], rng) + data[cut:])
        try:
            read_controlnet(file, unet)
        except LdmJaxError as error:
            refusals.append(str(error))
    assert refusals
    assert all(text.replace("\n", "").isprintable() for text in refusals)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "not a ControlNetModel"),
        ({"controlnet_conditioning_channel_order": "gbr"}, "neither rgb nor bgr"),
        ({"conditioning_embedding_out_channels": [8, 16]}, "conditioning_embedding_out_channels"),
        ({"attention_head_dim": 4}, "another base model"),
        ({"down_block_types": 3}, "not understood"),
        ({"act_fn": "relu"}, "act_fn"),
    ],
)
def test_what_a_folder_of_a_controlnet_says_is_honoured_or_refused(tmp_path, config, message):
    unet = UNet(**UNET, legacy=False)
    fields = {
        "_class_name": "ControlNetModel",
        "block_out_channels": [32],
        "down_block_types": ["CrossAttnDownBlock2D"],
        "layers_per_block": 1,
        "attention_head_dim": 2,
        "cross_attention_dim": 8,
    }
    net = ControlNet(**{name: getattr(unet, name) for name in FIELDS})
    zeros = jax.tree.map(lambda s: np.zeros(s.shape, np.float16), param_shapes(net))
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file(to_theirs(TABLES[ControlNet](net), zeros), file)
    own = {"controlnet_conditioning_channel_order": "bgr", "global_pool_conditions": True}
    (tmp_path / "config.json").write_text(json.dumps(fields | own))
    assert read_controlnet(tmp_path, unet)[0] == net.clone(bgr=True, global_pool=True)
    (tmp_path / "config.json").write_text(json.dumps(fields | config))
    with pytest.raises(LdmJaxError, match=message):
        read_controlnet(tmp_path, unet)
