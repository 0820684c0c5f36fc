"""Makes pictures: python sample.py --prompt "red apple, noto style"

Every setting is kept inside each PNG; --replay PICTURE.png makes the same one again.
"""

from absl import flags

from ldm_jax.cli import run as cli
from ldm_jax.cli import sample as sampling

# what
flags.DEFINE_multi_string("prompt", [], "What to make; may be given several times.")
flags.DEFINE_string("prompts_file", None, "A text file with a prompt on each line.")
flags.DEFINE_multi_string(
    "class", [], "A class by number or name, several times if need be; with --format also: all."
)
flags.DEFINE_multi_string(
    "negative", [], "What to be guided away from, for all prompts or one for each."
)
flags.DEFINE_integer(
    "num",
    4,
    "Pictures for each prompt, with seeds --seed, --seed + 1, ...; with --format: in all.",
    1,
)
flags.DEFINE_integer("seed", 0, "The first seed.", lower_bound=0)
flags.DEFINE_integer(
    "interpolate", None, "Pictures on the way from each (prompt, seed) to the next.", lower_bound=1
)

# from what
flags.DEFINE_string(
    "image", None, "A picture to begin with; for a super-resolution model, to enlarge."
)
flags.DEFINE_float(
    "strength", None, "How much of --image goes, above 0 and up to 1 (default: 0.75)."
)
flags.DEFINE_string("mask", None, "A picture that is white where --image is to be made anew.")
flags.DEFINE_list("outpaint", None, "TOP,RIGHT,BOTTOM,LEFT: pixels to be added around --image.")
flags.DEFINE_float(
    "variation", None, "How far to go from --image by its inverted noise, from 0 to 1."
)
flags.DEFINE_string("semantic_map", None, "A picture whose pixels are label numbers.")
flags.DEFINE_string(
    "layout",
    None,
    'A JSON file of boxes: [{"label": "cup", "box": [left, top, width, height]}, ...].',
)
flags.DEFINE_string(
    "embeddings", None, "A .npy file of vectors [m, dim], for a model of ready-made embeddings."
)

# how
flags.DEFINE_string(
    "model",
    "emoji",
    "A model directory, a checkpoint of the original, or a model that ships with ldm_jax.",
)
flags.DEFINE_string(
    "model_config",
    None,
    "The original's YAML of a checkpoint (default: its names and shapes tell).",
)
flags.DEFINE_string(
    "sampler",
    None,
    "ddim, ddpm, plms, dpmpp_2m, unipc, euler, heun ... (default: the model's own; a wrong name lists them all).",
)
flags.DEFINE_list(
    "steps",
    None,
    "Sampling steps (default: the model's own); several, 20,50, make a labelled grid.",
)
flags.DEFINE_list(
    "timesteps", None, "Where to stop: uniform, trailing, karras ..., or timesteps apart by commas."
)
flags.DEFINE_list(
    "guidance",
    None,
    "Scale of classifier-free guidance; 1 is none; several, 1,3,5, make a labelled grid.",
)
flags.DEFINE_list("guidance_interval", None, "FIRST,LAST timestep that is guided (default: all).")
flags.DEFINE_float(
    "guidance_rescale", None, "How far to bring guided outputs back to their spread, from 0 to 1."
)
flags.DEFINE_float("eta", None, "Noise of the DDIM sampler, from 0 (deterministic) to 1.")
flags.DEFINE_float(
    "temperature", None, "Of that noise, and of DDPM's; below 1 pictures vary less (default: 1)."
)
flags.DEFINE_integer(
    "cache_interval",
    None,
    "Calls of the UNet of which one is full, the others reuse its deep features (default: 1).",
)
flags.DEFINE_integer(
    "cache_depth", None, "First and last rows of the UNet that run in every call (default: 1)."
)
flags.DEFINE_string(
    "size", None, "HEIGHTxWIDTH in pixels, e.g. 64x96 (default: as trained, or as the image is)."
)
flags.DEFINE_integer(
    "batch", None, "Pictures made at a time (default: at most 8, with --format 64).", lower_bound=1
)
flags.DEFINE_integer(
    "decode_batch",
    None,
    "Pictures decoded at a time on a device (default: 512x512 pixels, on a CPU 128x128).",
)
flags.DEFINE_integer(
    "tile", None, "Decode larger pictures in tiles of so many pixels, not exactly (default: never)."
)
flags.DEFINE_string(
    "dtype", None, "float32, bfloat16 or float16 (default: float32 on CPU, bfloat16 elsewhere)."
)
flags.DEFINE_enum("parallel", "jit", ["jit", "pmap"], "How a batch is spread over several devices.")

# where to
flags.DEFINE_string("out", "outputs", "Folder for the pictures; what is there stays.")
flags.DEFINE_bool("grid", True, "Also write one picture of all pictures.")
flags.DEFINE_integer(
    "progress_every",
    None,
    "Also write what every k-th call of the model predicts, as a row.",
    lower_bound=1,
)
flags.DEFINE_bool("gif", False, "Also write an animation of the steps, or of --interpolate.")
flags.DEFINE_enum(
    "format",
    None,
    ["npz", "png", "zip"],
    "Many pictures in one file (png: a folder); goes on if stopped.",
)
flags.DEFINE_string("replay", None, "A PNG made by this program: make the same picture again.")

if __name__ == "__main__":
    cli.run(sampling.sample)
