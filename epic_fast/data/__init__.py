"""Files to batches: folders of pictures and texts, any picture to RGB, examples to tensors."""

from epic_fast.data.archive import resolve_data
from epic_fast.data.check import FolderReport, check_folder
from epic_fast.data.collate import Collator
from epic_fast.data.dataset import Example, Mask, PairDataset, read_mask
from epic_fast.data.folder import DataFolder, read_folder, read_rows
from epic_fast.data.images import load_image, load_mask
from epic_fast.data.refcoco import convert_refcoco
from epic_fast.data.scenes import make_scenes
from epic_fast.data.sequences import SequenceDataset, read_sequences, write_sequences
from epic_fast.data.truncation import TruncationReport, truncation_report
from epic_fast.data.utterances import make_sentiment

__all__ = [
    "Collator",
    "DataFolder",
    "Example",
    "FolderReport",
    "Mask",
    "PairDataset",
    "SequenceDataset",
    "TruncationReport",
    "check_folder",
    "convert_refcoco",
    "load_image",
    "load_mask",
    "make_scenes",
    "make_sentiment",
    "read_folder",
    "read_mask",
    "read_rows",
    "read_sequences",
    "resolve_data",
    "truncation_report",
    "write_sequences",
]
