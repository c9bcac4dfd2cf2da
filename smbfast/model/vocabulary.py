"""Rows for tokens that are new to a pretrained backbone, thousands of them where codes are tokens.

A row starts as the mean of the embeddings of the token's text plus a vector of its bin, alike for
neighbouring bins. An untied head is treated alike, with embeddings of its own. Everything is
computed in fp32 and rounded once, to the dtype of the table.

Legend: V vocabulary, R new tokens, D width, K directions.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from smbfast.base.plain_tokenizer import without_added_tokens
from smbfast.batch import NewToken
from smbfast.model.decoder import HfModule

SHARE = 0.1  # spread of the vectors of bins, of the table's standard deviation: our choice
DIRECTIONS = 4  # K, along which bins differ; all codes share them: our choice
SEED = 0  # of the directions


@torch.no_grad()
def fit_vocabulary(
    lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, new_tokens: Sequence[NewToken]
) -> None:
    """Give table and head a row for each id of the tokenizer, and new tokens their start.

    A row starts as the mean of its text's rows, or of all rows where there is no text, plus
    `bin_vectors`. The text is encoded without the added tokens, so it cannot hold one.

    Raises:
        ValueError: if a new token has no id of the tokenizer.
    """
    ids = [token.id for token in new_tokens]
    if ids and (max(ids) >= len(tokenizer) or len(set(ids)) < len(ids)):
        raise ValueError(
            f"new tokens must have ids below {len(tokenizer)}, each its own; got {len(ids)} up to "
            f"{max(ids)}"
        )
    known = min([*ids, len(tokenizer), _table(lm).num_embeddings])
    grow(lm, len(tokenizer))
    if not ids:
        return
    encoded = without_added_tokens(tokenizer).encode_batch(
        [token.text for token in new_tokens], add_special_tokens=False
    )
    # words of one code share their encoding, so each is averaged once for all bins
    parts = [tuple(i for i in e.ids if i < known) for e in encoded]
    place = {part: n for n, part in enumerate(dict.fromkeys(parts))}
    for weight_VD in _weights(lm):
        old_VD = weight_VD[:known]
        mean_D = old_VD.mean(0, dtype=torch.float32)
        means = [old_VD[list(p)].mean(0, dtype=torch.float32) if p else mean_D for p in place]
        row_RD = torch.stack(means)[[place[p] for p in parts]]
        row_RD += bin_vectors(new_tokens, float(old_VD.float().std()), row_RD.shape[1]).to(row_RD)
        weight_VD[ids] = row_RD.to(weight_VD.dtype)


@torch.no_grad()
def grow(lm: PreTrainedModel, size: int) -> None:
    """Give table and head at least `size` rows; those added are the mean of the others.

    An adapter holds the rows of its new tokens alone. Other rows of a table that has grown must be
    the same again when it is loaded, so nothing about them is random.
    """
    before = _table(lm).num_embeddings
    if size <= before:
        return
    lm.resize_token_embeddings(size, mean_resizing=False)
    for weight_VD in _weights(lm):
        weight_VD[before:] = weight_VD[:before].mean(0, dtype=torch.float32).to(weight_VD.dtype)


def bin_vectors(new_tokens: Sequence[NewToken], deviation: float, width: int) -> Tensor:
    """Return the vectors of the bins, fp32 [R, D] on the CPU; 0 for a token without a bin.

        u = (bin + 1/2) / num_bins    vector = SHARE deviation c sum_k cos(pi k u) / k d_k

    with K fixed random directions d_k, each element a standard normal, and c = (sum_k 1 / (2 k²))
    ^ (-1/2): averaged over u, the elements have the standard deviation SHARE deviation. The first
    cosine falls from one end of u to the other, so that the bins of a code differ; the others are
    smaller, so that bins are the farther apart the more of them lie between.

    Args:
        deviation: the standard deviation of the elements of the table.
    """
    direction_KD = torch.randn(DIRECTIONS, width, generator=torch.Generator().manual_seed(SEED))
    place_R1 = torch.tensor(
        [math.nan if t.bin is None else (t.bin + 0.5) / (t.num_bins or 1) for t in new_tokens]
    )[:, None]
    order_K = torch.arange(1, DIRECTIONS + 1)
    curve_RK = (torch.cos(math.pi * place_R1 * order_K) / order_K).nan_to_num(0.0)
    size = SHARE * deviation / math.sqrt(float((0.5 / order_K**2).sum()))
    return size * curve_RK @ direction_KD


def _table(lm: PreTrainedModel) -> HfModule:
    return lm.get_input_embeddings()


def _weights(lm: PreTrainedModel) -> list[Tensor]:
    """The weights of table and head, one where they are tied."""
    head: HfModule = lm.get_output_embeddings()
    return list({id(m.weight): m.weight for m in (_table(lm), head)}.values())
