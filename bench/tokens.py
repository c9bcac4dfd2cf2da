"""python -m bench.tokens DATA...: tokens an event, by format, bucket and element of the layout.

Counts what training reads: all tokens of the windows of the training split, with what each window
repeats at its start, by a BPE trained on that same text as `smbfast.prepare` trains it. The rows
below the two formats are `text-paper` with one element written as `text` does, and `text` with one
element written as `text-paper` does. In the format `codes` an event's token counts as its name, and
gaps and birthdays as headers.

Legend: P pieces of a layout, U distinct ones.
"""

import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from bench import records
from smbfast.base.config import Settings, command_line
from smbfast.base.runtime import git_state, versions
from smbfast.batch import Timeline
from smbfast.data.bucket import tokenizer_of
from smbfast.data.codes.serializer import CodeSerializer
from smbfast.data.codes.statistics import CodeStatistics
from smbfast.data.codes.vocabulary import CodeVocabulary
from smbfast.data.formats import MINUTE
from smbfast.data.layout import Layout
from smbfast.data.meds import EventBatch, MedsDataset
from smbfast.data.sections import SectionMap
from smbfast.data.serialize import Serializer, SerializerOptions
from smbfast.data.style import LEAN, PAPER, Style
from smbfast.data.timelines import Preamble, training_spans, window_of
from smbfast.data.tokens import TextEncoder, train_tokenizer

ELEMENTS = ("headers", "tags", "names", "values", "separators", "newlines", "demographics, age")
REPEATED = "repeated by windows"
STYLES: dict[str, Style] = {"text-paper": PAPER, "text": LEAN}


class TokensBench(Settings):
    """Count how many tokens an event takes in each format, and what they are spent on.

    Name the folders of MEDS datasets, then options: `python -m bench.tokens FOLDER FOLDER`.
    """

    epilog: ClassVar[str] = """Examples

  Both formats by day, and each element of the layout alone:
    python -m bench.tokens ../shared/data/eicu-demo

  Finer buckets, without the single elements:
    python -m bench.tokens ../shared/data/eicu-demo --buckets=hour,moment --single=false"""

    data: list[str] = Field(min_length=1, description="Folders of the MEDS datasets.")
    formats: list[Literal["text-paper", "text", "codes"]] = Field(
        ["text-paper", "text", "codes"], min_length=1, description="Values of data.format to count."
    )
    gap_floors: list[int] = Field(
        [5, 360], min_length=1, description="With the format codes: values of data.gap_floor."
    )
    buckets: list[Literal["day", "hour", "moment"]] = Field(
        ["day"], min_length=1, description="Values of data.bucket to count."
    )
    vocab_size: int = Field(
        8192, ge=400, description="The largest number of tokens of the BPE, as data.vocab_size."
    )
    window: int = Field(4096, ge=64, description="Context length in tokens, as data.window.")
    single: bool = Field(
        True, description="Count also each format with one element of the layout exchanged."
    )
    subjects: int | None = Field(
        None, ge=1, description="The largest number of training subjects; `none` takes all."
    )
    save: bool = Field(False, description="Append the results to bench/results/tokens.jsonl.")


def styles(formats: list[str], single: bool) -> dict[str, tuple[str, Style]]:
    """Format and style of each row of the table, by its name."""
    rows = {form: (form, STYLES[form]) for form in formats if form in STYLES}
    for form in list(rows) if single else []:
        other = LEAN if form == "text-paper" else PAPER
        for field in fields(Style):
            change = {field.name: getattr(other, field.name)}
            name = f"{form}, {field.name}={change[field.name]}"
            rows[name] = (form, replace(STYLES[form], **change))
    return rows


def count(
    dataset: MedsDataset, form: str, style: Style, bucket: str, settings: TokensBench
) -> dict[str, Any]:
    """Tokens an event of each element and in all, and what they were counted on."""
    options = SerializerOptions(bucket=bucket, format=form)  # type: ignore[arg-type]
    composer = TextEncoder(train_tokenizer([], 300))  # only its delimiters show in the text
    about = SectionMap.read(), dataset.descriptions, dataset.parents
    serializer = Serializer(composer, *about, options, style)
    tokenizer = tokenizer_of(serializer, _batches(dataset, settings), settings.vocab_size)
    serializer = serializer.with_encoder(TextEncoder(tokenizer))
    spent: Counter[str] = Counter(dict.fromkeys((*ELEMENTS, REPEATED), 0))
    num_subjects = 0
    for batch in _batches(dataset, settings):
        layout = Layout(serializer, batch)
        spent.update(_elements(layout))
        timelines = layout.timelines()
        num_subjects += len(timelines)
        preamble = serializer.preamble
        for timeline in timelines:
            # the age is the end of the header, and no piece of the layout
            first = timeline.bucket_time_B[:1].tolist()
            spent["demographics, age"] += sum(len(preamble.age(timeline.birth, t)) for t in first)
            spent[REPEATED] += _num_repeated(timeline, settings.window, preamble)
    events = serializer.counts["events"]
    return {"vocabulary": len(tokenizer), "subjects": num_subjects, **_an_event(spent, events)}


def count_codes(
    dataset: MedsDataset, vocabulary: CodeVocabulary, gap_floor: int, settings: TokensBench
) -> dict[str, Any]:
    """Tokens an event of the format codes, as `count` returns them; `gap_floor` is in minutes."""
    serializer = CodeSerializer(vocabulary, gap_floor=gap_floor * MINUTE)
    spent: Counter[str] = Counter(dict.fromkeys((*ELEMENTS, REPEATED), 0))
    preamble, num_subjects = serializer.preamble, 0
    for batch in _batches(dataset, settings):
        for timeline in serializer.timelines(batch):
            num_subjects += 1
            num_events = len(timeline.line_start_L)
            spent["names"] += num_events
            spent["demographics, age"] += timeline.header
            spent["headers"] += len(timeline) - timeline.header - num_events
            spent[REPEATED] += _num_repeated(timeline, settings.window, preamble)
    events = serializer.counts["events"]
    return {"vocabulary": len(vocabulary), "subjects": num_subjects, **_an_event(spent, events)}


def _num_repeated(timeline: Timeline, window: int, preamble: Preamble) -> int:
    """The tokens of a timeline's windows beyond its own."""
    spans = training_spans(timeline, window, window, preamble)
    cuts = (window_of(timeline, *span, window, preamble)[0] for span in spans)
    return sum(map(len, cuts)) - (len(timeline) if spans else 0)


def _an_event(spent: Counter[str], events: int) -> dict[str, Any]:
    return {
        "events": events,
        "tokens_per_event": sum(spent.values()) / events,
        "by_element": {element: n / events for element, n in spent.items()},
    }


def fitted(dataset: MedsDataset) -> CodeVocabulary:
    """The vocabulary of codes of the train split."""
    statistics = CodeStatistics()
    for batch in dataset.batches("train"):
        statistics.add(batch)
    about = SectionMap.read(), dataset.descriptions, dataset.parents
    return CodeVocabulary.fit(statistics, *about)


def _batches(dataset: MedsDataset, settings: TokensBench) -> Iterator[EventBatch]:
    return dataset.batches("train", dataset.subjects("train")[: settings.subjects])


def _elements(layout: Layout) -> Counter[str]:
    """How many tokens the pieces of a layout spend on each element."""
    demographics_P = _in_demographics(layout)
    element_U = _element_tokens(layout)
    spent: Counter[str] = Counter()
    for here, of_demographics in ((~demographics_P, False), (demographics_P, True)):
        times_U = np.bincount(layout.piece_P[here], minlength=len(element_U))
        for times, element in zip(times_U.tolist(), element_U, strict=True):
            for name, num in element.items() if times else ():
                spent["demographics, age" if of_demographics else name] += times * num
    return spent


def _in_demographics(layout: Layout) -> np.ndarray:
    """Which pieces stand before the first bucket of their subject, bool [P]."""
    lead_at = np.append(layout.lead_at, len(layout.piece_P))
    inside_P = np.zeros(len(layout.piece_P), bool)
    for a, first, _ in layout._subject_leads():
        inside_P[lead_at[a] : lead_at[first]] = True
    return inside_P


def _element_tokens(layout: Layout) -> list[Counter[str]]:
    """The tokens of each distinct piece by element.

    A colon or comma that is one token with the bracket before it counts as a separator.
    """
    is_line_U = np.zeros(len(layout.strings), bool)
    is_line_U[layout.piece_P[layout.line_P >= 0]] = True
    element_U = []
    for text, ids, is_line in zip(layout.strings, layout._table_ids(), is_line_U, strict=True):
        if text.startswith("\0"):
            element_U.append(Counter({"tags": len(ids)}))
        elif not is_line:
            element_U.append(Counter({"headers": len(ids)}))
        else:
            # a value begins with a space, and a name never does
            inner = "values" if text.startswith(" ") else "names"
            end = text[-1]
            last = "newlines" if end == "\n" else "separators" if end in ":," else inner
            element_U.append(Counter({inner: len(ids) - 1}) + Counter({last: 1}))
    return element_U


def shown(results: list[dict[str, Any]]) -> str:
    """A table with a row for each result, in tokens an event."""
    rows = [["data", "bucket", "layout", "all", *ELEMENTS, REPEATED]]
    for result in results:
        parts = [f"{result['by_element'][e]:.2f}" for e in (*ELEMENTS, REPEATED)]
        about = [result["data"], result["bucket"], result["layout"]]
        rows.append([*about, f"{result['tokens_per_event']:.3f}", *parts])
    return records.columns(rows)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    plain = [a for a in argv if not a.startswith("-") and "=" not in a]
    options = [a for a in argv if a not in plain]
    options += [f"--data={','.join(plain)}"] if plain else []
    settings = command_line(TokensBench, options, prog="python -m bench.tokens")
    results = []
    for folder in settings.data:
        try:
            dataset = MedsDataset.open(Path(folder))
        except ValueError as error:
            sys.exit(f"python -m bench.tokens: {error}")
        for bucket in settings.buckets:
            for layout, (form, style) in styles(list(settings.formats), settings.single).items():
                about = {"bench": "tokens", "data": Path(folder).name, "bucket": bucket}
                counted = count(dataset, form, style, bucket, settings)
                results.append({**about, "layout": layout, "window": settings.window, **counted})
                print(f"{results[-1]['data']}, {bucket}, {layout}: ", end="", file=sys.stderr)
                print(f"{counted['tokens_per_event']:.2f}", file=sys.stderr, flush=True)
        if "codes" in settings.formats:
            vocabulary = fitted(dataset)
            for floor in settings.gap_floors:
                about = {"bench": "tokens", "data": Path(folder).name, "bucket": "", "window": 0}
                layout = f"codes, gaps from {floor} min"
                counted = count_codes(dataset, vocabulary, floor, settings)
                results.append({**about, "layout": layout, "window": settings.window, **counted})
    print(shown(results))
    if settings.save:
        made = {"versions": versions(), "git": git_state(), "at": time.strftime("%Y-%m-%d")}
        records.append("tokens", [{**result, **made} for result in results])


if __name__ == "__main__":
    main()
