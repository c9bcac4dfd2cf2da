"""The names of a vocabulary of codes as a tokenizer, alone or added to that of a backbone.

Events become ids in `CodeVocabulary.encode`, never through text. A tokenizer is what a model's
folder holds, so that an id can be read as a name.
"""

from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from smbfast.data.codes.vocabulary import CodeVocabulary


def code_tokenizer(vocabulary: CodeVocabulary) -> PreTrainedTokenizerFast:
    """Return a tokenizer with the tokens of a vocabulary and no others.

    `decode(id)` is a token's name. The names are whole words: spaces in them stay, and a text that
    is no name is refused when it is encoded.

    Raises:
        ValueError: the vocabulary does not begin at id 0.
    """
    if vocabulary.first_id:
        raise ValueError(
            f"a vocabulary with a tokenizer of its own must begin at id 0, got "
            f"{vocabulary.first_id}"
        )
    names = [token.name for token in vocabulary.tokens]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)})),
        pad_token=names[vocabulary.pad],
        bos_token=names[vocabulary.begin],
        clean_up_tokenization_spaces=False,  # it would change names such as `a , b`
    )


def with_codes(tokenizer: PreTrainedTokenizerBase, vocabulary: CodeVocabulary) -> list[str]:
    """Add the tokens of a vocabulary to a pretrained tokenizer; return their names there.

    The id of a token is `first_id` plus its place in the vocabulary. Its name stands in brackets
    (our choice), such as `⟦LAB//GLU < 7⟧`. Without them it could be a word that the tokenizer
    knows, such as `<pad>` or a short code, and would be found within plain text.

    Raises:
        ValueError: `first_id` is not the size of the tokenizer, or the tokenizer knows a name.
    """
    if vocabulary.first_id != len(tokenizer):
        raise ValueError(
            f"`first_id` of the vocabulary must be {len(tokenizer)}, the size of the tokenizer; "
            f"got {vocabulary.first_id}"
        )
    names = [f"⟦{token.name}⟧" for token in vocabulary.tokens]
    known = tokenizer.get_vocab()
    present = [i for i, name in enumerate(names) if name in known]
    if present:
        raise ValueError(
            f"the tokenizer must know no name of the vocabulary of codes; it knows {len(present)}, "
            f"the first is the token at place {present[0]}: name a backbone without tokens of codes"
        )
    # not normalized: names that only look alike stay apart
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in names])
    expected = list(range(vocabulary.first_id, vocabulary.first_id + len(names)))
    if tokenizer.convert_tokens_to_ids(names) != expected:
        raise ValueError(
            f"the tokenizer must give the {len(names)} tokens of the vocabulary the ids from "
            f"{vocabulary.first_id} on; it gave others"
        )
    return names
