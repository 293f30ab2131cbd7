"""Encode of 128 tokens by the JSON API, end to end, against the bare cost: forward to the hook, matmul, top k."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch

from tests.benchmarks.servers import Servers, demo, interleaved, medians, seconds
from workers.checkpoints import load_sae
from workers.language_model import LanguageModel

N_TOKENS, K, ROUNDS = 128, 10, 40
WORDS = "The harbour was quiet that morning and she counted the boats while her brother wrote down their names . "


class _Stop(Exception):
    pass


def main() -> dict[str, Any]:
    with demo() as servers:
        text = prompt(servers)
        body = {"modelId": servers.model, "source": servers.source, "text": text, "numResults": K, "ignoreBos": True}
        bare = bare_encode(servers, text)

        def over_http() -> None:
            answer = servers.http.post("/api/search-topk-by-token", json=body)
            assert len(answer.json()["results"]) == N_TOKENS - 1, answer.text[:200]

        found = medians(interleaved({"http": lambda: seconds(over_http), "bare": lambda: seconds(bare)}, ROUNDS))
    return {
        "over HTTP, ms": round(found["http"] * 1000, 1),
        "bare, ms": round(found["bare"] * 1000, 1),
        "ratio": round(found["http"] / found["bare"], 2),
        "wanted": "at most 1.25",
    }


def prompt(servers: Servers) -> str:
    """A text of exactly N_TOKENS tokens with its beginning-of-text token."""
    language = LanguageModel.load(servers.model_dir)
    ids = language.to_ids(WORDS * 12)[1:N_TOKENS]
    text = language.tokenizer.decode(ids)
    assert len(language.to_ids(text)) == N_TOKENS
    return text


def bare_encode(servers: Servers, text: str) -> Any:
    """The least that has to be computed, from transformers and torch alone."""
    language, coder = LanguageModel.load(servers.model_dir), load_sae(servers.sae_dir)
    ids = torch.tensor([language.to_ids(text)])
    block = language.module_of(coder.hook_name)[0]

    def stop(_module: Any, _args: Any, output: Any) -> None:
        stop.resid = output  # pyright: ignore[reportFunctionMemberAccess]
        raise _Stop

    block.register_forward_hook(stop)

    @torch.inference_mode()
    def bare() -> None:
        with suppress(_Stop):
            language.body(input_ids=ids, use_cache=False)
        pre_acts = torch.addmm(coder.b_enc, stop.resid[0] - coder.b_dec, coder.W_enc)  # pyright: ignore
        pre_acts.topk(K, dim=-1)

    return bare


if __name__ == "__main__":
    from tests.benchmarks.__main__ import show

    show("encode", main())
