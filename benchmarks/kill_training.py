"""Kills a small training run at random moments, saves included, and checks what is left.

    python -m benchmarks.kill_training [--kills 25]

Each time the run is started again, as a scheduler would, and killed (SIGKILL) after a random number
of further steps. After every kill the newest state must be readable and at most one interval behind
the last reported step; the final state must be bit-identical to that of an undisturbed run.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

ROOT = Path(__file__).parent.parent
EVERY = 3  # steps from save to save
CONFIG = """
from ldm_jax.configs import emoji_kl


def get_config():
    config = emoji_kl.get_config("smoke")
    config.update(steps={steps}, log_every=1, save_every={every})
    config.update(eval_every=10**6, preview_every=10**6)
    config.data.size = (16, 16)
    config.model.first_stage.update(ch=8, ch_mult=(1, 2), resolution=16)
    return config
"""


def arrays(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """The whole state of a step."""
    import orbax.checkpoint as ocp

    folder = workdir / "checkpoints" / str(step) / "state"
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(folder).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        state = checkpointer.restore(folder, restore_args=as_numpy)
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(state)
    }


def newest(workdir: Path) -> int:
    """The last complete step; -1 before the first."""
    folder = workdir / "checkpoints"
    steps = (
        [int(path.name) for path in folder.iterdir() if path.name.isdigit()]
        if folder.is_dir()
        else []
    )
    return max(steps, default=-1)


def reported(workdir: Path) -> int:
    """The last step in metrics.jsonl."""
    file = workdir / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    steps = [0]
    for line in lines:
        try:
            steps.append(json.loads(line)["step"])
        except ValueError:  # half a line
            continue
    return max(steps)


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, kills, slow = random.Random(args.seed), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        config, steps = root / "tiny.py", 6 * args.kills
        config.write_text(CONFIG.format(steps=steps, every=EVERY))

        def start(workdir: Path) -> subprocess.Popen:
            command = [
                sys.executable,
                str(ROOT / "train.py"),
                f"--config={config}",
                f"--workdir={workdir}",
            ]
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

        straight, killed = root / "straight", root / "killed"
        process = start(straight)
        said = process.communicate()[1]
        if process.returncode:
            sys.exit(f"the undisturbed run failed:\n{said}")

        while kills < args.kills:
            process = start(killed)
            wanted, wait = reported(killed) + rng.randint(1, 8), rng.uniform(0, 0.3)
            while process.poll() is None and reported(killed) < wanted:
                time.sleep(0.002)
            time.sleep(wait)  # into a save, or between two
            if process.poll() is not None:
                slow += 1
                if slow > 3:
                    sys.exit(f"the run ended after {kills} kills: give fewer")
                continue
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
            kept, last = newest(killed), reported(killed)
            if kept >= 0 and not all(np.isfinite(a).all() for a in arrays(killed, kept).values()):
                sys.exit(f"kill {kills}: the state of step {kept} is not readable as numbers")
            if last - max(kept, 0) > EVERY:
                sys.exit(f"kill {kills} at step {last}: the newest state is of step {kept}")
            print(f"kill {kills:2d} at step {last}: goes on from {max(kept, 0)}", flush=True)

        process = start(killed)
        said = process.communicate()[1]
        if process.returncode:
            sys.exit(f"the last run failed:\n{said}")
        found, expected = arrays(killed, steps), arrays(straight, steps)
        differing = [name for name in expected if not np.array_equal(found[name], expected[name])]
        if differing or found.keys() != expected.keys():
            sys.exit(f"the end differs in {differing[:3]}")
        print(
            f"{kills} kills, {steps} steps: bit-identical to the undisturbed run "
            f"({len(expected)} arrays)"
        )


if __name__ == "__main__":
    main()
