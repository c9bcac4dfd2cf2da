"""Small event tables, tokenizers of several families, and generated tables, for the tests beside.

Legend: N events, S1 = subjects + 1 offsets.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from hypothesis import strategies as st
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from smbfast.batch import Timeline
from smbfast.data.meds import BIRTH, STATIC, EventBatch
from smbfast.data.sections import SectionMap
from smbfast.data.serialize import Serializer, SerializerOptions
from smbfast.data.tokens import Delimiters, TextEncoder, load_tokenizer, train_tokenizer

DATA = Path(__file__).parents[2].parent / "shared" / "data"
DATASETS = ("mimic-iv-demo", "eicu-demo")
Event = tuple[str | int | None, str, float | None, str | None]  # time, code, value, text

LINES = (
    "[2150-01-31]\n<measurements>\nGlucose [Blood, Chem] (mg/dL): 101, 4.2e+05 abnormal, -3.5\n",
    "</measurements>\n<drugs>\nCefazolin (IV) x2: 5 mg (PO), 1.0%\nHeparin x3\n</drugs>\n",
    "[2150-02-01 07:00]\n<conditions>\nType 2 diabetes mellitus\nHeart rate: 80, 81, 82.\n",
)
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)


def us(time: str | int | None) -> int:
    """Microseconds since 1970 of `2150-01-31 07:10`; None is no time."""
    if time is None:
        return STATIC
    return time if isinstance(time, int) else int(np.datetime64(time, "us").astype(np.int64))


def batch_of(*subjects: list[Event], first: int = 1) -> EventBatch:
    """Subjects `first`, `first + 1`, ... with their events, sorted as `MedsDataset` sorts them."""
    ordered = [sorted(events, key=lambda e: us(e[0])) for events in subjects]
    rows = [e for events in ordered for e in events]
    codes = list(dict.fromkeys(e[1] for e in rows))
    texts = list(dict.fromkeys(e[3] for e in rows if e[3] is not None))
    sizes = [len(events) for events in ordered]
    return EventBatch(
        subject_N=np.repeat(np.arange(first, first + len(sizes), dtype=np.int64), sizes),
        time_N=np.array([us(e[0]) for e in rows], np.int64),
        code_N=np.array([codes.index(e[1]) for e in rows], np.int32),
        value_N=np.array([np.nan if e[2] is None else e[2] for e in rows], np.float32),
        text_N=np.array([-1 if e[3] is None else texts.index(e[3]) for e in rows], np.int32),
        codes=codes,
        texts=texts,
        offset_S1=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
    )


def event(
    time: str | int | None, code: str, value: float | None = None, text: str | None = None
) -> Event:
    return (time, code, value, text)


def one_subject(batch: EventBatch, s: int) -> EventBatch:
    a, b = batch.offset_S1[s : s + 2]
    return batch.rows(np.arange(a, b), np.array([0, b - a]))


def serializer_of(
    tokenizer: PreTrainedTokenizerBase,
    delimiters: Delimiters = "special",
    descriptions: dict[str, str] | None = None,
    **options: object,
) -> Serializer:
    encoder = TextEncoder(tokenizer, delimiters)
    return Serializer(
        encoder, SectionMap.read(), descriptions or {}, None, SerializerOptions(**options)
    )


def assert_same_timeline(got: Timeline, expected: Timeline) -> None:
    scalars = ("subject", "header", "birth", "start", "labels_from")
    assert [getattr(got, n) for n in scalars] == [getattr(expected, n) for n in scalars]
    for name in vars(expected):
        if name not in scalars:
            assert np.array_equal(getattr(got, name), getattr(expected, name)), name


def our_bpe() -> PreTrainedTokenizerBase:
    return train_tokenizer(LINES * 3, 600)


def family_tokenizer(
    name: str, folder: Path, delimiters: Delimiters
) -> tuple[PreTrainedTokenizerBase, list[int]]:
    """A small tokenizer built as a known family builds its own, saved and loaded as a user's is."""
    model, special = models.BPE(), ["<|endoftext|>"]
    if name == "llama3":
        model = models.BPE(ignore_merges=True)
    if name.startswith("sentencepiece"):
        model, special = models.BPE(unk_token="<unk>"), ["<unk>", "<s>"]
    backend = Tokenizer(model)
    backend.decoder = decoders.ByteLevel()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name == "gpt2")
    if name == "gpt2":
        backend.pre_tokenizer = byte_level
    elif name in ("qwen", "llama3"):
        regex = Regex({"qwen": QWEN, "llama3": LLAMA3}[name])
        split = pre_tokenizers.Split(regex, "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        backend.normalizer = normalizers.NFC() if name == "qwen" else None
    else:  # no pre-tokenizer: merges run over spaces, as in Llama 2
        steps = [normalizers.Replace(" ", "▁")]
        if name == "sentencepiece-prefixed":
            steps.insert(0, normalizers.Prepend("▁"))
        backend.normalizer = normalizers.Sequence(steps)
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(LINES * 3, trainer)
    if name == "llama3":  # adds a begin token by itself when asked for special tokens
        begin = ("<|endoftext|>", backend.token_to_id("<|endoftext|>"))
        backend.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[begin]
        )
    begins = {"gpt2": special[0], "llama3": special[0], "qwen": None}.get(name, "<s>")
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=begins, eos_token=special[-1]
    ).save_pretrained(folder)
    return load_tokenizer(str(folder), delimiters)


# generated tables: codes of every section, awkward ones, few days and hours so that lines repeat
CODES = (
    "LAB//GLU", "LAB//GLU.", "DIAGNOSIS//E11", "MEDICATION//x (IV)", "GENDER//F", "MEDS_DEATH",
    "NOTE//a", "[2150-01-31]", "<odd", "Zoë 血糖: 5,", "x3", "'s", "-", "a\n\nb\t c", "\u0301e",
    " ",
)  # fmt: skip
TEXTS = ("neg", "n/a.", "", " ", "a, b", "12:30", "x\ny", "\u0338", "[1]", "y" * 70, "\u3000", "ﬁ")
MINUTE = 60_000_000
DAY = 86_400_000_000
_START = us("2150-01-31")

_plain_text = st.text(st.characters(exclude_characters="<", exclude_categories=["Cs"]), max_size=6)
times = st.builds(
    lambda day, minute: _START + day * DAY + minute * 30 * MINUTE,
    st.integers(0, 3),
    st.integers(0, 47),
)
values = st.one_of(
    st.none(), st.sampled_from([0.0, -0.0, 101.0, 1e-30, 4.2e9]), st.floats(width=32)
).map(lambda v: None if v is None or not np.isfinite(v) else v)
timed_events = st.tuples(
    times,
    st.one_of(st.sampled_from(CODES), _plain_text),
    values,
    st.one_of(st.none(), st.sampled_from(TEXTS), _plain_text),
)
static_events = st.tuples(
    st.none(), st.sampled_from(["GENDER//F", "RACE//x", "LAB//GLU"]), st.none(), st.none()
)
births = st.tuples(
    st.one_of(times, st.just(us("2100-05-02 11:00")), st.none()),
    st.just(BIRTH),
    st.none(),
    st.none(),
)


@st.composite
def subjects(draw: st.DrawFn) -> list[Event]:
    """The events of one subject, at least one, in any order."""
    events = [
        *draw(st.lists(static_events, max_size=2)),
        *draw(st.lists(births, max_size=2)),
        *draw(st.lists(timed_events, min_size=1, max_size=14)),
    ]
    return draw(st.permutations(events))


def nodes_of(events: list[Event]) -> Iterator[int]:
    """Prediction times before, at and between a subject's events."""
    moments = sorted({us(e[0]) for e in events} - {STATIC})
    for moment in moments:
        yield from (moment - 1, moment, moment + MINUTE)
