"""Conditioning of inpainting models: the masked image, black or filled, encoded, and its mask."""

import jax
import jax.numpy as jnp
import numpy as np
from conftest import KL, random_params

from ldm_jax.conditioning.masked import filled, masked_condition
from ldm_jax.models.autoencoder import init_autoencoder
from ldm_jax.models.build import build_first_stage
from ldm_jax.models.ldm import FirstStage, to_float


def first_stage():
    """A random first stage of downsampling factor 2 with a scale other than 1."""
    module = build_first_stage({"first_stage": KL})
    shapes = jax.eval_shape(lambda: init_autoencoder(module, jax.random.key(0)))
    return FirstStage(random_params(shapes, 1), 0.5, module)


def test_the_masked_picture_and_its_mask_are_concatenated():
    stage = first_stage()
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
    mask = np.zeros((2, 16, 16, 1), np.uint8)
    mask[0, :, 8:] = 1
    # Other pixels under the mask.
    hidden = np.where(mask > 0, rng.integers(0, 256, image.shape), image).astype(np.uint8)
    found = masked_condition(stage, to_float(image), jnp.asarray(mask))
    np.testing.assert_array_equal(
        found, masked_condition(stage, to_float(hidden), jnp.asarray(mask))
    )
    np.testing.assert_array_equal(found[..., 4], np.where(mask[:, ::2, ::2, 0] > 0, 1.0, -1.0))
    black = np.where(mask > 0, 0, image).astype(np.uint8)
    np.testing.assert_allclose(
        found[..., :4], stage.encode(to_float(black)) / 0.5, rtol=1e-5, atol=1e-6
    )


def test_a_filled_hole_continues_its_surroundings():
    """Matches NumPy for a side that does not halve; extends a ramp; leaks no hidden pixels."""
    rng = np.random.default_rng(0)
    pixels = rng.uniform(-1, 1, (2, 10, 12, 3)).astype(np.float32)
    known = (rng.uniform(size=(2, 10, 12, 1)) > 0.6).astype(np.float32)
    known[0, 2:9, 3:11] = 0
    found = filled(jnp.asarray(pixels), jnp.asarray(known))
    np.testing.assert_allclose(found, filled_by_hand(pixels, known), atol=1e-5)
    np.testing.assert_array_equal(np.asarray(found)[known[..., 0] > 0], pixels[known[..., 0] > 0])
    np.testing.assert_array_equal(
        found, filled(jnp.where(known > 0, pixels, 7.0), jnp.asarray(known))
    )
    assert not filled(jnp.asarray(pixels), jnp.zeros_like(known)).any()
    ramp = np.broadcast_to(np.linspace(-1, 1, 16, dtype=np.float32)[:, None, None], (1, 16, 16, 3))
    hole = np.ones((1, 16, 16, 1), np.float32)
    hole[:, 6:9, 4:12] = 0
    assert np.abs(filled(jnp.asarray(ramp), jnp.asarray(hole)) - ramp).max() < 0.2


def filled_by_hand(pixels, known):
    levels = [(pixels, known)]
    while pixels.shape[1] * pixels.shape[2] > 1:
        b, h, w, c = pixels.shape
        small, seen = (
            np.zeros((b, -(-h // 2), -(-w // 2), c), np.float32),
            np.zeros((b, -(-h // 2), -(-w // 2), 1)),
        )
        for y, x in np.ndindex(small.shape[1:3]):
            weight = known[:, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
            total = (weight * pixels[:, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2]).sum((1, 2))
            small[:, y, x] = total / np.maximum(weight.sum((1, 2)), 1)
            seen[:, y, x] = weight.sum((1, 2)) > 0
        levels.append((pixels := small, known := seen))
    behind = levels.pop()[0] * known
    for pixels, known in reversed(levels):
        b, h, w, c = pixels.shape
        high, wide = behind.shape[1:3]
        out = np.zeros_like(pixels)
        # Bilinear halfway between centres: 3/4 of the nearer, 1/4 of the next.
        for y, x in np.ndindex(h, w):
            rows = {min(max(y // 2 + (1 if y % 2 else -1), 0), high - 1): 0.25}
            columns = {min(max(x // 2 + (1 if x % 2 else -1), 0), wide - 1): 0.25}
            rows[y // 2], columns[x // 2] = (
                rows.get(y // 2, 0) + 0.75,
                columns.get(x // 2, 0) + 0.75,
            )
            out[:, y, x] = sum(
                r * q * behind[:, i, j] for i, r in rows.items() for j, q in columns.items()
            )
        behind = known * pixels + (1 - known) * out
    return behind


def test_a_filled_picture_gives_latents_and_the_masked_share_of_each_cell():
    stage = first_stage()
    image = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
    mask = np.zeros((2, 16, 16, 1), np.uint8)
    mask[0, :, 7:], mask[1, 3, 3] = 1, 1
    found = masked_condition(stage, to_float(image), jnp.asarray(mask), "masked_filled")
    np.testing.assert_array_equal(
        found[0, :, :, 4], np.broadcast_to(np.repeat([0, 0.5, 1], [3, 1, 4]), (8, 8))
    )
    assert found[1, :, :, 4].sum() == found[1, 1, 1, 4] == 0.25
    whole = stage.encode(filled(to_float(image), 1.0 - mask))
    np.testing.assert_allclose(found[..., :4], whole, rtol=1e-5, atol=1e-6)
