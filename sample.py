"""Makes pictures: python sample.py --prompt "red apple, noto style"

Every setting is kept inside each PNG; --replay PICTURE.png makes the same one again.
"""

from absl import flags

from ldm_jax import cli

flags.DEFINE_multi_string("prompt", [], "What to make; may be given several times.")
flags.DEFINE_string("prompts_file", None, "A text file with a prompt on each line.")
flags.DEFINE_string(
    "model", "emoji", "A model directory, a checkpoint of the original, or a model that ships with ldm_jax."
)
flags.DEFINE_string("model_config", None, "The original's YAML of a checkpoint (default: its names and shapes tell).")
flags.DEFINE_integer("num", 4, "Pictures for each prompt, with seeds --seed, --seed + 1, ...", lower_bound=1)
flags.DEFINE_integer("seed", 0, "The first seed.", lower_bound=0)
flags.DEFINE_integer("steps", None, "Sampling steps (default: the model's own).")
flags.DEFINE_float("guidance", None, "Scale of classifier-free guidance; 1 is none (default: the model's own).")
flags.DEFINE_float("eta", None, "Noise of the DDIM sampler, from 0 (deterministic) to 1.")
flags.DEFINE_string(
    "sampler",
    None,
    "ddim, ddpm, plms, dpmpp_2m, unipc, euler, heun ... (default: the model's own; a wrong name lists them all).",
)
flags.DEFINE_string("size", None, "HEIGHTxWIDTH in pixels, e.g. 64x96 (default: as trained).")
flags.DEFINE_integer("batch", None, "Pictures made at a time (default: at most 8).", lower_bound=1)
flags.DEFINE_string("out", "outputs", "Folder for the pictures; what is there stays.")
flags.DEFINE_bool("grid", True, "Also write one picture of all pictures.")
flags.DEFINE_string("dtype", None, "float32, bfloat16 or float16 (default: float32 on CPU, bfloat16 elsewhere).")
flags.DEFINE_enum("parallel", "jit", ["jit", "pmap"], "How a batch is spread over several devices.")
flags.DEFINE_string("replay", None, "A PNG made by this program: make the same picture again.")

if __name__ == "__main__":
    cli.run(cli.sample)
