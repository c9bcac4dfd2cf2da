"""The benchmark of embeddings: what is compared, and what ends it with an error."""

import json

import pytest

from bench import embed, records

QUICK = ["--quick", "--only=eight"]


@pytest.mark.slow
def test_every_case_runs_and_is_recorded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    embed.main(["--quick", "--save"])
    lines = [json.loads(line) for line in (tmp_path / "embed.jsonl").read_text().splitlines()]
    assert [line["case"] for line in lines] == list(embed.BARS)
    for line in lines:
        assert 0 < line["error"] < 1e-6 or line["error"] == 0
        assert line["ratio"] > 0 and line["nodes"] > 0 and line["bar"] == embed.BARS[line["case"]]
    assert "no bar is judged" in capsys.readouterr().out


@pytest.mark.slow
def test_embeddings_of_other_nodes_end_it(monkeypatch):
    right = embed.ours

    def shifted(case, part, out):
        # as if each node had the next one's text
        own = embed.Case(case.name, case.encoder, lambda p: _next(case.texts(p)), case.parts)
        right(own, part, out)

    def _next(texts):
        texts = list(texts)
        for text, other in zip(texts, texts[1:] + texts[:1], strict=True):
            yield embed.NodeText(text.index, text.subject, text.time, 0, other.ids_T)

    monkeypatch.setitem(embed.VARIANTS, "smbfast", shifted)
    with pytest.raises(SystemExit, match="eight: the embeddings differ"):
        embed.main(QUICK)


def test_a_case_below_its_bar_is_bad():
    record = {"case": "mimic", "error": 1e-7, "tolerance": 1e-4, "ratio": 0.96, "bar": 0.97}
    assert embed._bad(record, judged=True) == ["mimic: 0.96 x, and the bar is 0.97"]
    assert not embed._bad(record, judged=False)
    assert not embed._bad({**record, "ratio": 0.98}, judged=True)
    assert embed._bad({**record, "error": float("nan")}, judged=False)


def test_an_unknown_case_is_refused():
    with pytest.raises(SystemExit, match="must be among mimic, eicu, eight"):
        embed.main(["--quick", "--only=other"])
