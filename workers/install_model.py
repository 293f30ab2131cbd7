"""Make a model directory (safetensors, tokenizer, vocabulary.json, card.json) from a GGUF, a directory or a hub id.

Run as `python -m workers.install_model {gguf|directory|hub} SOURCE --id ID --name NAME --out MODELS_DIR`. The last line
printed is the card as JSON. A directory appears whole or not at all. Only safetensors weights are read, never pickles.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from app.errors import BadFile
from app.protocol import ModelCard
from app.tokens import write_vocabulary

HUB_PATTERNS = ["*.json", "*.safetensors", "tokenizer.model", "*.txt", "*.jinja"]


def install(kind: str, source: str, model_id: str, name: str, models_dir: Path) -> ModelCard:
    """Write `models_dir/model_id` from a source and return its card. An existing directory of that id is replaced."""
    models_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=models_dir, prefix=".new-") as scratch:
        target = Path(scratch) / model_id
        match kind:
            case "gguf":
                _from_gguf(Path(source), target)
            case "directory":
                _from_directory(Path(source), target)
            case "hub":
                _from_hub(source, target)
            case _:
                raise BadFile(f"A model comes from gguf, directory or hub, not {kind!r}.")
        card = _describe(target, model_id, name, f"{kind}: {Path(source).name if kind == 'gguf' else source}")
        final = models_dir / model_id
        if final.exists():
            shutil.rmtree(final)
        os.replace(target, final)
    return card


def _from_gguf(file: Path, target: Path) -> None:
    """Dequantise a GGUF into float32 safetensors.

    transformers marks such a model as quantised and then refuses to save it, so the state dict moves to a clean copy.
    """
    _say(f"Reading {file.name}")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    quantised = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    settings = quantised.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "transformers_version"):
        settings.pop(key, None)
    model = type(quantised)(type(quantised.config)(**settings))
    model.load_state_dict(quantised.state_dict())
    _say("Writing safetensors")
    if "<|endoftext|>" in tokenizer.get_vocab():
        # SmolLM2 separates documents by this token in pretraining, and its loss is lowest after it (3.543 against
        # 3.573 nats for <|im_start|>, which the tokenizer names).
        tokenizer.bos_token = "<|endoftext|>"  # noqa: S105 - a vocabulary entry, not a secret
        model.config.bos_token_id = tokenizer.bos_token_id
        model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _from_directory(source: Path, target: Path) -> None:
    if not (source / "config.json").is_file():
        raise BadFile(f"{source} holds no config.json; give the directory that save_pretrained wrote.")
    if not list(source.glob("*.safetensors")):
        raise BadFile(f"{source} holds no .safetensors weights; convert the model with save_pretrained first.")
    files = [f for pattern in HUB_PATTERNS for f in source.glob(pattern)]
    target.mkdir(parents=True)
    for file in files:
        shutil.copyfile(file, target / file.name)


def _from_hub(repo: str, target: Path) -> None:
    from huggingface_hub import snapshot_download

    _say(f"Fetching {repo}")
    _from_directory(Path(snapshot_download(repo, allow_patterns=HUB_PATTERNS)), target)


def _describe(directory: Path, model_id: str, name: str, origin: str) -> ModelCard:
    """Write vocabulary.json and card.json."""
    _say("Describing the model")
    config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    if not (directory / "tokenizer.json").is_file():
        tokenizer.save_pretrained(directory)  # from vocab.json and merges.txt, or a SentencePiece model
    text = config.get_text_config()  # a model that also sees keeps its language part's sizes apart
    write_vocabulary(directory / "vocabulary.json", token_bytes(tokenizer, text.vocab_size))
    n_heads, d_model = text.num_attention_heads, text.hidden_size
    card = ModelCard(
        id=model_id,
        name=name,
        hash=_hash(sorted(directory.glob("*.safetensors"))),
        architecture=(config.architectures or [AutoModelForCausalLM._model_mapping[type(config)].__name__])[0],  # pyright: ignore
        n_layers=text.num_hidden_layers,
        d_model=d_model,
        n_heads=n_heads,
        d_head=getattr(text, "head_dim", None) or d_model // n_heads,
        d_mlp=getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * d_model,
        d_vocab=text.vocab_size,
        n_ctx=text.max_position_embeddings,
        bos_token_id=tokenizer.bos_token_id,
        special_token_ids=sorted({i for i, token in tokenizer.added_tokens_decoder.items() if token.special}),
        tokenizer_hash=_hash([directory / "tokenizer.json"])[:16],
        has_chat_template=bool(tokenizer.chat_template),
        n_params=_count_params(directory),
        origin=origin,
    )
    (directory / "card.json").write_text(card.model_dump_json(indent=2))
    return card


def token_bytes(tokenizer: Any, d_vocab: int) -> list[bytes]:
    """The bytes of each of the model's d_vocab tokens, from a byte-level BPE or a SentencePiece vocabulary."""
    strings = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    byte_level = "ByteLevel" in json.dumps(json.loads(tokenizer.backend_tokenizer.to_str()).get("decoder"))
    alphabet = _byte_level_alphabet()

    def convert(token: str | None) -> bytes:
        if token is None:
            return b""
        if token in special:
            return token.encode()
        if byte_level and all(c in alphabet for c in token):
            return bytes(alphabet[c] for c in token)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return token.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()

    tokens = [convert(token) for token in strings[:d_vocab]]
    return tokens + [f"<unused {i}>".encode() for i in range(len(tokens), d_vocab)]


def _byte_level_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in GPT-2's byte-level BPE."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}


def _count_params(directory: Path) -> int:
    from safetensors import safe_open

    total = 0
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            for key in weights.keys():  # noqa: SIM118 - a handle, not a dict
                shape = weights.get_slice(key).get_shape()
                total += int(torch.Size(shape).numel())
    return total


def _hash(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as handle:
            while block := handle.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["gguf", "directory", "hub"])
    parser.add_argument("source")
    parser.add_argument("--id", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    try:
        card = install(args.kind, args.source, args.id, args.name, args.out)
    except BadFile as error:
        sys.exit(str(error))
    sys.stdout.write(card.model_dump_json() + "\n")


if __name__ == "__main__":
    main()
