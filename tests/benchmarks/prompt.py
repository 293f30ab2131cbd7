"""A prompt of 128 and of 1,024 tokens, one SAE, against the bare limit and a notebook; 16 clients; a second feature."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from statistics import median, quantiles
from typing import Any

import httpx
import torch
from sae_lens import SAE
from transformer_lens.model_bridge import TransformerBridge

from tests.benchmarks.encode import WORDS
from tests.benchmarks.servers import Servers, demo, interleaved, seconds
from workers.checkpoints import load_sae
from workers.language_model import LanguageModel

K, ROUNDS, CLIENTS, CLIENT_TOKENS = 10, {128: 24, 1024: 8}, 16, 128


class _Stop(Exception):
    pass


def main() -> dict[str, Any]:
    with demo() as servers:
        language, coder = LanguageModel.load(servers.model_dir), load_sae(servers.sae_dir)
        bridge = TransformerBridge.boot_transformers(str(servers.model_dir), device="cpu", dtype=torch.float32)
        theirs: Any = SAE.load_from_disk(str(servers.sae_dir))
        figures: dict[str, Any] = {}
        for n_tokens in ROUNDS:
            figures |= _latency(servers, language, coder, bridge, theirs, n_tokens)
        figures |= _clients(servers, language, coder)
        figures |= _second_feature(servers, language)
    return figures


def _latency(
    servers: Servers, language: LanguageModel, coder: Any, bridge: Any, theirs: Any, n_tokens: int
) -> dict[str, Any]:
    """Each round has a text of its own, so that nothing is answered from what was kept of an earlier one."""
    texts = iter(_texts(language, n_tokens, ROUNDS[n_tokens] + 3))
    now = [""]

    def over_http() -> float:
        now[0] = next(texts)
        body = {"modelId": servers.model, "source": servers.source, "text": now[0], "numResults": K}
        return seconds(lambda: servers.http.post("/api/search-topk-by-token", json=body).raise_for_status())

    @torch.inference_mode()
    def notebook() -> None:
        ids = torch.tensor([language.to_ids(now[0])])
        _, cache = bridge.run_with_cache(ids)
        theirs.encode(cache[coder.hook_name]).topk(K, dim=-1)

    sides: dict[str, Callable[[], float]] = {
        "http": over_http,
        "bare": lambda: seconds(lambda: _bare(language, coder, [language.to_ids(now[0])])),
        "notebook": lambda: seconds(notebook),
    }
    found = interleaved(sides, ROUNDS[n_tokens])
    ms = {name: [1000 * value for value in values] for name, values in found.items()}
    p95 = quantiles(ms["http"], n=20)[-1]
    http, bare, book = (median(ms[name]) for name in ("http", "bare", "notebook"))
    return {
        f"{n_tokens} tokens, p50 / p95, ms": f"{http:.1f} / {p95:.1f}",
        f"{n_tokens} tokens, bare, ms": round(bare, 1),
        f"{n_tokens} tokens, over bare (aim <= 1.15x + 3 ms)": f"{http / bare:.2f}x, limit {1.15 * bare + 3:.1f} ms",
        f"{n_tokens} tokens, notebook / ours (aim >= 3)": round(book / http, 2),
    }


def _clients(servers: Servers, language: LanguageModel, coder: Any) -> dict[str, Any]:
    """16 clients at once, a text each, against one bare batch of 16 that is waiting in a list.

    The clients are threads of this process, on the same cores, with connections they keep. Their own work counts, but
    for making a client: httpx takes some 10 ms of CPU for that. The second figure has that in it too.
    """
    texts = iter(_texts(language, CLIENT_TOKENS, CLIENTS * 18, start=900))
    clients = [_client(servers) for _ in range(CLIENTS)]
    batch: list[str] = []

    def together(client_of: Callable[[int], httpx.Client]) -> float:
        batch[:] = [next(texts) for _ in range(CLIENTS)]
        threads = [
            threading.Thread(target=lambda n=n: _ask(client_of(n), servers, batch[n]))  # pyright: ignore
            for n in range(CLIENTS)
        ]

        def all_of_them() -> None:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        return seconds(all_of_them)

    def bare() -> float:
        return seconds(lambda: _bare(language, coder, [language.to_ids(text) for text in batch]))

    sides: dict[str, Callable[[], float]] = {
        "kept": lambda: together(clients.__getitem__),
        "new": lambda: together(lambda _: _client(servers)),
        "bare": bare,
    }
    found = interleaved(sides, 6, warm_up=2)
    kept, new, limit = (median(found[name]) for name in ("kept", "new", "bare"))
    return {
        "16 clients, tokens/s": f"{CLIENTS * CLIENT_TOKENS / kept:,.0f}",
        "16 clients over the bare batch (aim >= 0.8)": round(limit / kept, 2),
        "16 clients over the bare batch, clients made anew": round(limit / new, 2),
    }


def _client(servers: Servers) -> httpx.Client:
    return httpx.Client(base_url=servers.http.base_url, timeout=600)


def _ask(client: httpx.Client, servers: Servers, text: str) -> None:
    body = {"modelId": servers.model, "source": servers.source, "text": text, "numResults": K}
    client.post("/api/search-topk-by-token", json=body).raise_for_status()


def _second_feature(servers: Servers, language: LanguageModel) -> dict[str, Any]:
    [text] = _texts(language, 128, 1, start=5000)

    def ask(index: int) -> float:
        key = {"modelId": servers.model, "source": servers.source, "index": str(index)}
        body = {"feature": key, "customText": text}
        return seconds(lambda: servers.http.post("/api/activation/new", json=body).raise_for_status())

    ask(0)
    times = sorted(1000 * ask(index) for index in range(1, 41))
    return {"second feature on a text of 128 tokens, p50 / p95, ms (aim < 10)": f"{times[20]:.1f} / {times[37]:.1f}"}


def _texts(language: LanguageModel, n_tokens: int, n: int, start: int = 0) -> list[str]:
    """Texts of exactly n_tokens tokens with their first one, each different from its beginning."""
    made: list[str] = []
    for number in range(start, start + n):
        ids = language.to_ids(f"Number {number}. " + WORDS * (n_tokens // 12))[1:n_tokens]
        made.append(language.tokenizer.decode(ids))
    return made


@torch.inference_mode()
def _bare(language: LanguageModel, coder: Any, rows: list[list[int]]) -> None:
    """The least that has to be computed: forward to the hook, matmul, top k. Tokenising is in it, as in the others."""
    kept: dict[str, torch.Tensor] = {}

    def stop(_module: Any, _args: Any, output: Any) -> None:
        kept["x"] = output[0] if isinstance(output, tuple) else output
        raise _Stop

    handle = language.module_of(coder.hook_name)[0].register_forward_hook(stop)
    with suppress(_Stop):
        language.body(input_ids=torch.tensor(rows), use_cache=False)
    handle.remove()
    torch.addmm(coder.b_enc, kept["x"].flatten(0, 1) - coder.b_dec, coder.W_enc).topk(K, dim=-1)


if __name__ == "__main__":
    from tests.benchmarks.__main__ import show

    show("prompt", main())
