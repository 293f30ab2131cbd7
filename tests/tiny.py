"""A tiny random Llama with its own tokenizer, two tiny SAEs, and a real worker process: what tests run against."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from app.protocol import ModelRef, SaeRef
from app.settings import Settings
from workers.checkpoints import save_sae
from workers.install_model import install

TEXT = (
    "the cat sat on the mat and the dog ran after it because rain fell all night long over seven hills "
    "while sailors sang of rivers, bread and iron; nobody knew why the old clock struck thirteen at noon"
)
HOOK = "blocks.1.hook_resid_post"
D_IN, D_SAE, K = 24, 40, 5


@dataclass(frozen=True)
class Tiny:
    """The tiny world on disk, in the layout of a data directory."""

    data_dir: Path
    model: ModelRef
    topk: SaeRef
    standard: SaeRef


def make(data_dir: Path, scratch: Path) -> Tiny:
    save_tiny_model(scratch)
    install("directory", str(scratch), "tiny", "Tiny", data_dir / "models")
    save_tiny_sae(data_dir / "saes" / "topk", "topk", seed=1)
    save_tiny_sae(data_dir / "saes" / "standard", "standard", seed=2)
    return Tiny(
        data_dir,
        ModelRef(id="tiny", path=str(data_dir / "models" / "tiny")),
        SaeRef(id="tiny/1-topk", path=str(data_dir / "saes" / "topk")),
        SaeRef(id="tiny/1-std", path=str(data_dir / "saes" / "standard")),
    )


def save_tiny_model(directory: Path) -> None:
    """3 layers, d_model 24, a byte-level BPE of about 300 tokens; sizes distinct so that a swapped axis fails."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")
    fast.chat_template = (
        "<bos>{% for m in messages %}{% if m.role == 'oracle' %}{{ raise_exception('no oracles') }}{% endif %}"
        "{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=D_IN,
        intermediate_size=52,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=fast.bos_token_id,
        eos_token_id=fast.eos_token_id,
        initializer_range=0.4,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    fast.save_pretrained(directory)


def save_tiny_sae(
    directory: Path, architecture: str, seed: int, hook: str = HOOK, d_in: int = D_IN, scale: float = 1.0, **more: Any
) -> None:
    """Random weights; `scale` shrinks what activations write, `more` goes into the config."""
    generator = torch.Generator().manual_seed(seed)
    W_dec = torch.randn(D_SAE, d_in, generator=generator)
    tensors = {
        "W_enc": W_dec.T.clone() + 0.1 * torch.randn(d_in, D_SAE, generator=generator),
        "b_enc": 0.1 * torch.randn(D_SAE, generator=generator),
        "W_dec": W_dec * scale,
        "b_dec": 0.1 * torch.randn(d_in, generator=generator),
    }
    config = {
        "architecture": architecture,
        "d_in": d_in,
        "d_sae": D_SAE,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"hook_name": hook, "model_name": "tiny"},
    } | ({"k": K, "rescale_acts_by_decoder_norm": False} if architecture == "topk" else {})
    save_sae(directory, config | more, tensors)


class WorkerProcess:
    """`python -m workers.gpu` with settings of its own."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | _variables(settings)
        self.process = subprocess.Popen([sys.executable, "-m", "workers.gpu"], env=environment)
        self._wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"the worker ended with {self.process.returncode}")
            with socket.socket(socket.AF_UNIX) as probe:
                if self.settings.socket_path.exists() and probe.connect_ex(str(self.settings.socket_path)) == 0:
                    return
            time.sleep(0.1)
        raise TimeoutError("the worker did not start")

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
        return self.process.wait(timeout=30)


def _variables(settings: Settings) -> dict[str, str]:
    return {f"SAE_ATLAS_{name.upper()}": str(value) for name, value in settings.model_dump(exclude_unset=True).items()}
