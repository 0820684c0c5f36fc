"""Makes the small checkpoints of this folder: run `python make.py` with torch 2.13.0.

One state dict goes through every format of torch.save; expected.json lists what the reader must
return.
"""

import collections
import json
import pathlib

import numpy as np
import torch

FOLDER = pathlib.Path(__file__).parent


class Tagged(torch.Tensor):
    """A subclass: saved through torch._tensor._rebuild_from_type_v2."""


def state_dict() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 8, generator=generator)
    state = collections.OrderedDict(
        float32=base,
        transposed=base.T,
        shared=base[1:4, ::2],
        flipped_order=base.permute(1, 0)[2:5],
        expanded=torch.arange(3.0)[:, None].expand(3, 5),
        scalar=torch.tensor(2.5),
        empty=torch.zeros(0, 4),
        offset=torch.arange(20)[7:11],
        parameter=torch.nn.Parameter(torch.randn(3, generator=generator)),
    )
    attributed = torch.nn.Parameter(torch.ones(2))
    attributed.note = "has an attribute"
    state["attributed"] = attributed
    state["tagged"] = torch.full((2, 1), 7.0).as_subclass(Tagged)
    for dtype in (
        "float64",
        "float16",
        "bfloat16",
        "int64",
        "int32",
        "int16",
        "int8",
        "uint8",
        "bool",
        "complex64",
    ):
        values = torch.randn(5, generator=generator) * 3
        state[f"as.{dtype}"] = values.to(getattr(torch, dtype))
    return state


def main() -> None:
    state = state_dict()
    tree = {
        "epoch": 3,
        "global_step": 1234,
        "lr": np.float64(0.25),
        "seen": {1, 2},
        "array": np.arange(6, dtype=np.int16).reshape(2, 3).T,
        "device": torch.device("cpu"),
        "size": torch.Size([2, 3]),
        "dtype": torch.float16,
        "path": pathlib.PurePosixPath("a/b"),
        "ids": collections.defaultdict(list, {"a": [1]}),
        "state_dict": state,
    }
    torch.save(tree, FOLDER / "zip.ckpt")
    torch.save(tree, FOLDER / "zip_protocol4.ckpt", pickle_protocol=4)
    torch.save(tree, FOLDER / "legacy.ckpt", _use_new_zipfile_serialization=False)
    newer = {
        "as.uint16": torch.tensor([1, 65535], dtype=torch.uint16),
        "as.float8_e4m3fn": torch.ones(3).to(torch.float8_e4m3fn),
    }
    torch.save(newer, FOLDER / "newer_dtypes.bin")
    torch.save(torch.nn.Linear(2, 2), FOLDER / "module.pth")
    expected = {
        name: {
            "shape": list(value.shape),
            "dtype": str(value.dtype).removeprefix("torch."),
            "values": torch.view_as_real(value).tolist()
            if value.is_complex()
            else value.to(torch.float64).tolist(),
        }
        for name, value in (state | newer).items()
    }
    (FOLDER / "expected.json").write_text(json.dumps(expected) + "\n")


if __name__ == "__main__":
    main()
