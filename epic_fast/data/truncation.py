"""How many texts are longer than the text tower."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

CHUNK = 1024


@dataclass(frozen=True)
class TruncationReport:
    """Texts against a limit of tokens.

    Attributes:
        texts: how many there are.
        truncated: how many have more tokens than ``max_length``, special tokens included.
        longest: tokens of the longest one, special tokens included.
        empty: how many hold nothing but white space.
        max_length: the limit.
    """

    texts: int
    truncated: int
    longest: int
    empty: int
    max_length: int

    @property
    def share(self) -> float:
        """Truncated texts among all, 0 to 1."""
        return self.truncated / self.texts if self.texts else 0.0

    def __str__(self) -> str:
        return (
            f"{self.truncated} of {self.texts} texts ({self.share:.1%}) are longer than {self.max_length} tokens and "
            f"are cut; the longest has {self.longest}, {self.empty} are empty"
        )


def truncation_report(
    texts: Sequence[str], tokenizer: Any, max_length: int, template: str | None = None
) -> TruncationReport:
    """Count the texts of which the tower sees only the first ``max_length`` tokens.

    Args:
        tokenizer: the backbone's own (Hugging Face).
        max_length: tokens that the tower takes, special ones included; ``model.backbone.max_text_length``.
        template: what texts are put into, ``model.text_template``; its tokens count.
    """
    lengths: list[int] = []
    for start in range(0, len(texts), CHUNK):
        chunk = list(texts[start : start + CHUNK])
        if template is not None:
            chunk = [template.replace("{text}", text) for text in chunk]
        # verbose=False: the tokenizer would warn of every text over its limit, and counting those is the purpose.
        encoded = tokenizer(chunk, truncation=False, padding=False, return_attention_mask=False, verbose=False)
        lengths.extend(len(ids) for ids in encoded["input_ids"])
    return TruncationReport(
        texts=len(lengths),
        truncated=sum(length > max_length for length in lengths),
        longest=max(lengths, default=0),
        empty=sum(not text.strip() for text in texts),
        max_length=max_length,
    )
