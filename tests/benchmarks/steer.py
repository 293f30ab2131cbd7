"""Steering over HTTP against transformers' generate with KV cache and a forward hook, and transformer-lens' with hooks.

A run is a default and a steered row of 48 tokens: one run, eight at once against eight in sequence, the time to the
first token, how soon the view of the next token follows its slider. All greedy, so every side makes the same tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import orjson
import torch
from transformer_lens.model_bridge import TransformerBridge

from tests.benchmarks.servers import Servers, demo, interleaved, medians, seconds
from workers.checkpoints import load_sae
from workers.language_model import LanguageModel

N_TOKENS, ROUNDS, STRENGTH, LATENT, N_RUNS = 48, 3, 8.0, 17, 8
PROMPT = "The most important thing to know about the sea is"


def main() -> dict[str, Any]:
    with demo() as servers:
        one = steered_run(servers)
        n_tokens, _ = one(16)
        # A row that ends early would leave the other to pay for whole steps, which generate's two rows never do.
        assert n_tokens == 2 * N_TOKENS, f"a row ended early: {n_tokens} tokens instead of {2 * N_TOKENS}"
        plain, direction = plain_generate(servers)
        lens = lens_generate(servers, direction)
        firsts: list[float] = []

        def eight() -> None:
            with ThreadPoolExecutor(N_RUNS) as pool:
                list(pool.map(one, range(N_RUNS)))

        def first() -> None:
            firsts.append(one(16)[1])

        sides: dict[str, Callable[[], float]] = {
            "one": lambda: 2 * N_TOKENS / seconds(first),
            "eight": lambda: N_RUNS * 2 * N_TOKENS / seconds(eight),
            "plain": lambda: 2 * N_TOKENS / seconds(plain),
            "lens": lambda: 2 * N_TOKENS / seconds(lens),
        }
        found = medians(interleaved(sides, ROUNDS, warm_up=1))
        follow = next_token(servers)
        views = [seconds(partial(follow, n)) for n in range(12)][2:]
    return {
        "one run over HTTP, tokens/s": round(found["one"], 1),
        "generate of two rows with a hook, tokens/s": round(found["plain"], 1),
        "ratio (aim >= 0.9)": round(found["one"] / found["plain"], 2),
        "eight runs at once, tokens/s": round(found["eight"], 1),
        "ratio to eight generates in sequence (aim >= 3)": round(found["eight"] / found["plain"], 2),
        "time to the first token, ms": round(1000 * sorted(firsts)[len(firsts) // 2], 1),
        "view of the next token, ms (aim < 100)": round(1000 * median(views), 1),
        "transformer-lens' generate with hooks, tokens/s": round(found["lens"], 1),
        "ratio to transformer-lens": round(found["one"] / found["lens"], 2),
    }


def next_token(servers: Servers) -> Callable[[float], None]:
    """What the page asks when a slider comes to rest at a strength."""

    def look(strength: float) -> None:
        feature = {"modelId": servers.model, "layer": servers.source, "index": LATENT, "strength": strength}
        body = {"prompt": PROMPT, "modelId": servers.model, "features": [feature]}
        assert servers.http.post("/api/steer/next", json=body).status_code == 200

    return look


def steered_run(servers: Servers) -> Callable[[int], tuple[int, float]]:
    """One streamed run: how many tokens came, and after how many seconds the first."""

    def run(seed: int) -> tuple[int, float]:
        body = {
            "prompt": PROMPT,
            "modelId": servers.model,
            "features": [{"modelId": servers.model, "layer": servers.source, "index": LATENT, "strength": STRENGTH}],
            "temperature": 0,
            "n_tokens": N_TOKENS,
            "seed": seed,
        }
        began = time.perf_counter()
        n, first = 0, 0.0
        with servers.http.stream("POST", "/api/steer/stream", json=body) as answer:
            assert answer.status_code == 200
            for line in answer.iter_lines():
                if orjson.loads(line)["event"] == "token":
                    first = first or time.perf_counter() - began
                    n += 1
        return n, first

    return run


def plain_generate(servers: Servers) -> tuple[Callable[[], object], torch.Tensor]:
    """transformers' generate of two rows, the second steered by a forward hook; and the direction."""
    language, sae = LanguageModel.load(servers.model_dir), load_sae(servers.sae_dir)
    direction = STRENGTH * sae.unit_direction(LATENT)
    ids = torch.tensor([language.to_ids(PROMPT)] * 2)
    asked: dict[str, Any] = {
        "do_sample": False,
        "min_new_tokens": N_TOKENS,
        "max_new_tokens": N_TOKENS,
        "pad_token_id": 0,
    }

    def hook(_module: Any, _args: Any, output: Any) -> Any:
        h = output[0] if isinstance(output, tuple) else output
        h[1] += direction
        return output

    def generate() -> None:
        handle = language.module_of(sae.hook_name)[0].register_forward_hook(hook)
        language.hf.generate(ids, attention_mask=torch.ones_like(ids), **asked)
        handle.remove()

    return generate, direction


def lens_generate(servers: Servers, direction: torch.Tensor) -> Callable[[], object]:
    """transformer-lens' own generate of two rows, with its KV cache and hooks."""
    bridge = TransformerBridge.boot_transformers(str(servers.model_dir), device="cpu")
    ids = torch.tensor([LanguageModel.load(servers.model_dir).to_ids(PROMPT)] * 2)
    hook_name = load_sae(Path(servers.sae_dir)).hook_name

    def hook(h: torch.Tensor, hook: Any) -> torch.Tensor:
        h[1] += direction
        return h

    def generate() -> None:
        with torch.inference_mode(), bridge.hooks(fwd_hooks=[(hook_name, hook)]):
            bridge.generate(
                ids, max_new_tokens=N_TOKENS, do_sample=False, stop_at_eos=False, return_type="tokens", verbose=False
            )

    return generate


if __name__ == "__main__":
    from tests.benchmarks.__main__ import show

    show("steer", main())
