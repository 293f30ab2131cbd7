"""Turn a pickled state dict (dictionary_learning's ae.pt) into safetensors, accepting tensors and nothing else.

Run as `python -m workers.convert_sae FILE OUT MAX_BYTES`, apart from every other process. torch.load with weights_only
builds tensors but calls nothing; what it built is refused unless it is a flat dict of dense tensors within the limit.
The last line on stderr says why. Integers (a trainer's counters) are written as float32 too.
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from app.errors import BadFile


def convert(file: Path, out: Path, max_bytes: int) -> None:
    """Write the tensors of file to out. Raises BadFile."""
    _check_archive(file, max_bytes)
    try:
        held = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        why = str(error).split("WeightsUnpickler error: ")[-1].split("Please file")[0].split("\n")[0]
        raise BadFile(f"refused, it holds more than tensors: {why[:160]}") from None
    save_file(_tensors(held, max_bytes), out)


def _check_archive(file: Path, max_bytes: int) -> None:
    """torch.save writes a zip without compression; anything else may grow without bound when it is opened."""
    if not zipfile.is_zipfile(file):
        raise BadFile("this is not an archive as torch.save writes it since 1.6; save it again with torch.save.")
    with zipfile.ZipFile(file) as archive:
        total = sum(member.file_size for member in archive.infolist())
    if total > max_bytes:
        raise BadFile(f"it unpacks to {total:,} bytes; {max_bytes:,} are allowed.")


def _tensors(held: Any, max_bytes: int) -> dict[str, Tensor]:
    if not isinstance(held, dict) or not held:
        raise BadFile(f"refused, it holds a {type(held).__name__}; a dict of tensors is expected.")
    for name, value in held.items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            raise BadFile(f"refused, {str(name)[:80]!r} is a {type(value).__name__}; every entry must be a tensor.")
        if value.layout != torch.strided or value.is_quantized or value.is_complex():
            raise BadFile(f"refused, {name[:80]!r} is no dense tensor of real numbers.")
    # A view with stride 0 makes a tensor of any size from a few bytes.
    total = sum(value.numel() * 4 for value in held.values())
    if total > 2 * max_bytes:
        raise BadFile(f"its tensors would take {total:,} bytes; {2 * max_bytes:,} are allowed.")
    return {name: value.detach().to(torch.float32).clone().contiguous() for name, value in held.items()}


if __name__ == "__main__":
    try:
        convert(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
    except BadFile as error:
        print(error.message, file=sys.stderr)  # noqa: T201
        sys.exit(1)
