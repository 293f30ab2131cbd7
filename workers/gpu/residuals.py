"""What was computed of texts read lately, within a bound of bytes: a second question on a text skips the model.

Activations at hooks, and of SAEs the top k and the totals, which cost the whole encoder. Kept on the device, least
recently used first out. Used from the lane's thread alone. What is kept is never written to.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from workers.language_model import LanguageModel

Key = tuple[str, str, str, tuple[int, ...]]


class Residuals:
    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.used_bytes = 0
        self.hits = 0
        """Texts that needed no forward pass."""
        self._kept: OrderedDict[Key, Tensor] = OrderedDict()

    def get(
        self, language: LanguageModel, ids: Sequence[int], hooks: Sequence[str]
    ) -> dict[str, Float[Tensor, "pos d"]] | None:
        """Return the activations of a text at all of the hooks, or None when one of them is missing."""
        keys = {hook: _key(language, hook, ids) for hook in hooks}
        if not all(key in self._kept for key in keys.values()):
            return None
        for key in keys.values():
            self._kept.move_to_end(key)
        self.hits += 1
        return {hook: self._kept[key] for hook, key in keys.items()}

    def find(self, language: LanguageModel, ids: Sequence[int], name: str) -> Float[Tensor, "pos d"] | None:
        """Return what was kept of a text under a name."""
        key = _key(language, name, ids)
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def put(self, language: LanguageModel, ids: Sequence[int], hook: str, acts: Float[Tensor, "pos d"]) -> None:
        """Keep something of a text under its hook or another name, and drop what was used longest ago.

        What is too large is not kept.
        """
        nbytes = acts.numel() * acts.element_size()
        key = _key(language, hook, ids)
        if nbytes > self.max_bytes or key in self._kept:
            return
        # A row of a padded batch is a view that would keep the whole batch in memory.
        self._kept[key] = acts if acts.untyped_storage().nbytes() == nbytes else acts.clone()
        self.used_bytes += nbytes
        while self.used_bytes > self.max_bytes:
            _, dropped = self._kept.popitem(last=False)
            self.used_bytes -= dropped.numel() * dropped.element_size()


def _key(language: LanguageModel, hook: str, ids: Sequence[int]) -> Key:
    return language.card.hash, str(language.dtype), hook, tuple(ids)
