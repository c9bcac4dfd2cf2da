"""The bench of tokens an event: its elements add up to what training reads."""

import json
from pathlib import Path

import pytest

from bench import records, tokens
from smbfast.data.meds import MedsDataset
from smbfast.data.style import LEAN, PAPER
from smbfast.simulation.dataset import simulate


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens") / "cohort"
    simulate(folder, 60, 0)
    return folder


def test_elements_add_up_and_are_recorded(
    cohort: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    options = ["--vocab_size=500", "--window=256", "--subjects=20", "--save"]
    tokens.main([str(cohort), "--buckets=day,hour", "--single=false", *options])
    lines = [json.loads(line) for line in (tmp_path / "tokens.jsonl").read_text().splitlines()]
    codes = [f"codes, gaps from {minutes} min" for minutes in (5, 360)]
    assert [(x["bucket"], x["layout"]) for x in lines] == [
        *((bucket, layout) for bucket in ("day", "hour") for layout in ("text-paper", "text")),
        *(("", layout) for layout in codes),
    ]
    printed = capsys.readouterr().out
    for line in lines:
        # sums of fractions over the same number of events: rounding of 64-bit floats alone
        assert sum(line["by_element"].values()) == pytest.approx(
            line["tokens_per_event"], rel=1e-12
        )
        assert line["subjects"] == 20 and line["data"] == "cohort" and line["window"] == 256
        # no name or value of the simulation needs a colon or comma in `text`
        none = {e for e, n in line["by_element"].items() if n == 0}
        if line["layout"] in codes:
            assert none == {"tags", "values", "separators", "newlines"}
        else:
            assert none == ({"separators"} if line["layout"] == "text" else set())
        assert f"{line['tokens_per_event']:.3f}" in printed
    paper, lean = lines[:2]
    assert lean["tokens_per_event"] < paper["tokens_per_event"]
    assert lines[-1]["tokens_per_event"] < lines[-2]["tokens_per_event"] < lean["tokens_per_event"]
    assert len({line["events"] for line in lines}) == 1


@pytest.mark.parametrize("form", ["text-paper", "text"])
def test_elements_are_those_of_the_tokens(cohort: Path, form: str) -> None:
    dataset = MedsDataset.open(cohort)
    settings = tokens.TokensBench(data=[str(cohort)], vocab_size=400, window=1 << 20)
    found = tokens.count(dataset, form, tokens.STYLES[form], "day", settings)
    # a window holds a whole timeline, so it adds the begin token alone
    repeated = found["by_element"][tokens.REPEATED] * found["events"]
    assert round(repeated) == found["subjects"] == len(dataset.subjects("train"))


def test_each_element_is_exchanged_once() -> None:
    rows = tokens.styles(["text-paper", "text"], single=True)
    assert rows["text-paper"] == ("text-paper", PAPER) and rows["text"] == ("text", LEAN)
    assert rows["text, closing=True"][1].closing and not rows["text, closing=True"][1].commas
    assert len(rows) == 2 + 2 * len(vars(PAPER))
    for name, (form, style) in rows.items():
        differing = vars(style).items() - vars(tokens.STYLES[form]).items()
        assert len(differing) == (", " in name)
    assert list(tokens.styles(["text"], single=False)) == ["text"]


def test_a_folder_without_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="must be a MEDS dataset"):
        tokens.main([str(tmp_path)])
