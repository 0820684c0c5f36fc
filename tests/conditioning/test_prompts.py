"""Prompts with weights and of any length."""

import jax
import numpy as np
import pytest

from ldm_jax.conditioning import make_conditioner
from ldm_jax.conditioning.prompts import BACKTRACK, Part, chunks_of, parse_weights

TOWER = {
    "kind": "clip",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


@pytest.mark.fast
@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a cat", [("a cat", 1)]),
        ("a (cat)", [("a ", 1), ("cat", 1.1)]),
        ("a ((cat)) b", [("a ", 1), ("cat", 1.21), (" b", 1)]),
        ("a [cat]", [("a ", 1), ("cat", 1 / 1.1)]),
        ("(a (cat:1.5):2)", [("a ", 2), ("cat", 3)]),
        ("(cat:0.25)", [("cat", 0.25)]),
        ("[(cat)]", [("cat", 1)]),
        (r"cat \(animal\)", [("cat (animal)", 1)]),
        ("(unclosed", [("unclosed", 1.1)]),
        ("closed)", [("closed)", 1)]),
        ("at 10:30)", [("at 10:30)", 1)]),
        ("(time 10:30", [("time 10:30", 1.1)]),
        ("a BREAK b", [("a ", 1), (None, 1), ("b", 1)]),
        ("OUTBREAK", [("OUTBREAK", 1)]),
        ("", []),
    ],
)
def test_weights(prompt, expected):
    found = parse_weights(prompt)
    assert [part.text for part in found] == [text for text, _ in expected]
    np.testing.assert_allclose([p.weight for p in found], [weight for _, weight in expected])
    assert all(isinstance(part, Part) for part in found)


@pytest.mark.fast
def test_chunks_end_at_a_comma():
    comma, room = 99, 75

    def sizes(tokens, **options):
        return [len(c) for c in chunks_of([(tokens, 1.0)], room, comma, **options)]

    words = [*range(1, 70)]
    assert sizes(words) == [69]
    assert sizes([]) == [0]
    assert sizes([1] * 75) == [75]
    assert sizes([1] * 76) == [75, 1]
    # The last comma is at place 60: the 14 words behind it go to the next chunk.
    assert sizes([*[1] * 60, comma, *[2] * 20]) == [61, 20]
    far = 75 - BACKTRACK - 1
    assert sizes([*[1] * far, comma, *[2] * 40]) == [75, far + 41 - 75]
    # A comma in the first place of a chunk is none to return to.
    assert sizes([*[1] * 75, comma, *[2] * 10]) == [75, 11]
    # A word of several vectors stays whole.
    assert sizes([*[1] * 73, 7, 8, 9, 1], runs={7: 3}) == [73, 4]
    parts = [([1, 2], 1.0), (None, 1.0), ([3], 2.0)]
    assert chunks_of(parts, room, comma) == [[(1, 1.0), (2, 1.0)], [(3, 2.0)]]
    assert chunks_of(parts[:2], room, comma) == [[(1, 1.0), (2, 1.0)]]
    assert chunks_of([(None, 1.0)], room, comma) == [[]]


@pytest.fixture(scope="module")
def texts():
    """(plain, weighted, parameters) of one text encoder."""
    plain = make_conditioner(TOWER, np.float32)
    weighted = make_conditioner(TOWER | {"weighted": True}, np.float32)
    params = plain.init(jax.random.key(0))
    params["final_norm"]["bias"] += 0.1  # the mean of states is not 0
    return plain, weighted, params


def context(conditioner, params, prompts):
    cond = jax.jit(conditioner.__call__)(params, conditioner.encode(prompts))
    return np.asarray(cond.crossattn)


def test_without_weights_nothing_changes(texts):
    plain, weighted, params = texts
    prompts = ["a red apple, on a table", ""]
    found, expected = (context(text, params, prompts) for text in (weighted, plain))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    rows = weighted.encode_rows({"caption": prompts})["encoded"]
    np.testing.assert_array_equal(rows, plain.encode(prompts))


def test_weights_scale_states_and_keep_the_mean(texts):
    plain, weighted, params = texts
    states = context(plain, params, ["a red apple"])
    found = context(weighted, params, ["a (red:1.5) apple"])
    scaled = states.copy()
    scaled[:, 2] *= 1.5  # start, a, red
    np.testing.assert_allclose(found, scaled * states.mean() / scaled.mean(), rtol=1e-4, atol=1e-6)


def test_long_prompts_are_chunks_of_one_context(texts):
    plain, weighted, params = texts
    long = " ".join(["apple"] * 75) + " pear"
    encoded = weighted.encode([long, "a cat"])
    assert encoded["tokens"].shape == (2, 2, 77)
    found = context(weighted, params, [long, "a cat"])
    assert found.shape == (2, 154, 8)
    pieces = context(plain, params, [" ".join(["apple"] * 75), "pear", "a cat", ""])
    np.testing.assert_allclose(found[0], np.concatenate(pieces[:2]), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[1], np.concatenate(pieces[2:]), rtol=1e-5, atol=1e-6)
    one, two = weighted.aligned([weighted.encode([""]), encoded])
    assert one["tokens"].shape == (1, 2, 77)
    assert two["tokens"].shape == (2, 2, 77)


def test_clip_skip_is_the_state_of_an_earlier_layer(texts):
    plain, _, params = texts
    earlier = make_conditioner(TOWER | {"clip_skip": 2}, np.float32)
    states = plain.module.apply({"params": params}, plain.encode(["a cat"]))
    np.testing.assert_allclose(
        context(earlier, params, ["a cat"]), states.penultimate, rtol=1e-5, atol=1e-6
    )
    with pytest.raises(ValueError, match="clip_skip must be from 1 to 2"):
        make_conditioner(TOWER | {"clip_skip": 3}, np.float32)
