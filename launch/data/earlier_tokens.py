"""Tokens that earlier versions prepared, whose reading of rows could change them.

Those versions let pyarrow guess types, took paths for patterns, did not look at the split of a
single file or for missing shards, and turned text that spells a special token into it. Their
folders are taken where nothing of that can have happened, or where the rows give the same tokens
today.
"""

from pathlib import Path

import torch

from launch.data.layout import TRAIN, require_whole_shards
from launch.data.readers import UnreadableError
from launch.data.rows import NOT_TEXT
from launch.data.token_set import TokenSet
from launch.data.tokenize import SpecialTokens


def find_doubt(manifest: dict, tokens: TokenSet, special: SpecialTokens) -> str | None:
    """Return why an earlier version may have changed the rows of `tokens`; None if it has not.

    Args:
        manifest: of the tokens.
        special: of the tokenizer that made them.
    """
    data = manifest["made_from"]["data"]
    files = [Path(name) for name in manifest["source_sha256"]]
    json_files = [file for file in files if ".json" in file.name]
    is_single = [str(file) for file in files] == [Path(data["path"]).name]
    if set("[]*?") & set(data["path"]):
        return "which took data.path for a pattern"
    if is_single and (data["split"] != TRAIN or data["config"] is not None):
        return "which did not look at data.split and data.config of a single file"
    if any(".csv" in file.name or ".tsv" in file.name for file in files) or len(json_files) > 1:
        return "which guessed the types of columns, and changed text that looks like another type"
    if json_files and NOT_TEXT in manifest["dropped"]:
        return "which dropped rows as not text though their text may only look like dates"
    try:
        require_whole_shards(files)
    except UnreadableError:
        return "which did not notice missing shards"
    if _hold_special_tokens(tokens, special):
        return "which turned text that spells special tokens into those tokens"
    return None


def _hold_special_tokens(tokens: TokenSet, special: SpecialTokens) -> bool:
    """Return whether the text of an example, without what a tokenizer puts around it, holds any."""
    ids = torch.tensor(sorted(special.ids), dtype=tokens.tokens.dtype)
    found = torch.isin(tokens.tokens, ids)
    for i in range(special.num_before):
        found[tokens.offsets[:-1] + i] = False
    for i in range(special.num_after + 1):  # the end of sequence too
        found[tokens.offsets[1:] - 1 - i] = False
    return bool(found.any())
