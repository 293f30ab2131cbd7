"""Tokens/s of a steering run, both rows together, against transformers' generate of two rows with KV cache."""

from __future__ import annotations

import asyncio
from typing import Any

import torch

from app import catalog
from app.gpu import Worker
from app.protocol import GenerateRequest, SaeRef, SteerDirection, Token
from tests.benchmarks.servers import Servers, demo, interleaved, medians, seconds
from workers.language_model import LanguageModel

N_TOKENS, ROUNDS, STRENGTH = 64, 7, 8.0
PROMPT = "The most important thing to know about the sea is"


def main() -> dict[str, Any]:
    with demo() as servers:
        n_tokens = count(servers)
        # A row that ends early would leave the other to pay for whole steps, which generate's two rows never do.
        assert n_tokens == 2 * N_TOKENS, f"a row ended early: {n_tokens} tokens instead of {2 * N_TOKENS}"
        plain = plain_generate(servers)
        body = {
            "prompt": PROMPT,
            "modelId": servers.model,
            "features": [{"modelId": servers.model, "layer": servers.source, "index": 17, "strength": STRENGTH}],
            "temperature": 0,
            "n_tokens": N_TOKENS,
            "stream": True,
        }

        def streamed() -> None:
            with servers.http.stream("POST", "/api/steer", json=body) as answer:
                assert answer.status_code == 200
                for _ in answer.iter_bytes():
                    pass

        sides = {
            "steer": lambda: n_tokens / seconds(streamed),
            "plain": lambda: 2 * N_TOKENS / seconds(plain),
        }
        found = medians(interleaved(sides, ROUNDS, warm_up=1))
    return {
        "steering over HTTP, tokens/s": round(found["steer"], 1),
        "plain generate of two rows, tokens/s": round(found["plain"], 1),
        "ratio": round(found["steer"] / found["plain"], 2),
        "wanted": "at least 0.8",
    }


def count(servers: Servers) -> int:
    """How many tokens the (greedy) run makes: a row may end before its limit."""
    request = GenerateRequest(
        model=catalog.model_ref(servers.settings, servers.model),
        prompt=PROMPT,
        directions=[
            SteerDirection(sae=SaeRef(id=servers.source, path=str(servers.sae_dir)), latent=17, coefficient=STRENGTH)
        ],
        max_new_tokens=N_TOKENS,
        temperature=0,
    )

    async def run() -> int:
        worker = Worker(servers.settings)
        n = sum([isinstance(event, Token) async for event in worker.generate(request)])
        await worker.close()
        return n

    return asyncio.run(run())


def plain_generate(servers: Servers) -> Any:
    language = LanguageModel.load(servers.model_dir)
    ids = torch.tensor([language.to_ids(PROMPT)] * 2)
    asked = {"do_sample": False, "min_new_tokens": N_TOKENS, "max_new_tokens": N_TOKENS, "pad_token_id": 0}
    return lambda: language.hf.generate(ids, attention_mask=torch.ones_like(ids), **asked)


if __name__ == "__main__":
    from tests.benchmarks.__main__ import show

    show("steer", main())
