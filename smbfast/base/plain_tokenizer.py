"""A tokenizer to which no text is structure: none of its added tokens is ever recognized."""

import json

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase


def without_added_tokens(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Return a copy without added tokens, post-processor, truncation or padding.

    The tokenizer must be a fast one. `split_special_tokens` would not do: it misses added tokens
    that are not marked special.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["added_tokens"] = []
    content["post_processor"] = None
    content["truncation"] = content["padding"] = None
    return Tokenizer.from_str(json.dumps(content))
