"""Tiny towers and small data folders for tests: random weights, nothing downloaded, a second to build."""

from epic_fast.testing.folders import make_folder
from epic_fast.testing.towers import tiny_bert, tiny_clip, tiny_llama, tiny_swin, tiny_tokenizer, tiny_vit

__all__ = ["make_folder", "tiny_bert", "tiny_clip", "tiny_llama", "tiny_swin", "tiny_tokenizer", "tiny_vit"]
