"""The report of synthetic run folders: what it shows, what it must never show, what it survives."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from bench.pages import SCHEMES, WIDTHS, Chromium, chromium, measured
from smbfast.report import main
from smbfast.reporting import comparisons, figures, took
from smbfast.reporting.page import write_report
from smbfast.reporting.runlog import Finding, read_run
from smbfast.reporting.verdict import alarms, collapse

HOSTILE = "</pre><script>alert(1)</script><img src=https://evil.example/x onerror=alert(2)> $x_{"


class Page(HTMLParser):
    """Tags, attributes and text of a page as a browser would see them."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(key, value or "") for key, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def interval(value: float, width: float = 0.03) -> dict:
    return {"value": value, "low": value - width, "high": value + width}


def header(**data: object) -> dict:
    return {
        "kind": "header",
        "config": {"phases": [{"name": "sft", "steps": 120}, {"name": "jepa", "steps": 180}]},
        "versions": {"smbfast": "0.1.0", "torch": "2.13.0", "python": "3.11.9"},
        "model": {"name": "qwen3, from scratch", "parameters": 3_412_480, "layers": 4},
        "data": {
            "simulated": True,
            "subjects": {"train": 1200, "tuning": 150, "held_out": 300},
            "tokens": {"train": 1_204_551, "tuning": 150_201},
            "truncated_lines": 112,
            "truncated_share": 0.00031,
            "unmapped": {"events": 214, "share": 0.00021, "codes": {"SIM//misc": 205}},
            **data,
        },
    }


def metrics(rank_falls_to: float = 0.93, ratio: float = 0.52, jepa: bool = True) -> list[dict]:
    """Records of a run of 120 SFT and 180 JEPA steps, evaluated every 20."""
    records = []
    for step in range(1, 301 if jepa else 121):
        phase = "sft" if step <= 120 else "jepa"
        into = step if phase == "sft" else step - 120
        wobble = math.sin(step * 12.9) * 0.06
        loss = 1.3 + 3.2 * math.exp(-step / 60)
        second = phase == "jepa"
        records.append(
            {
                "kind": "step",
                "step": step,
                "phase": phase,
                "sft": loss + wobble,
                "jepa": 0.5 + 0.6 * math.exp(-into / 50) + wobble / 2 if second else None,
                "grad_norm": 0.5 + 2 * math.exp(-into / 20) + abs(wobble) * 3,
                "lr": 1e-3 * min(1, into / 15) * (0.55 + 0.45 * math.cos(into / 60)),
                "tokens_per_s": 5200 - 1500 * second + wobble * 2000,
                "memory_gib": 1.1 + 0.4 * second,
                "wait": 0.01 + abs(wobble) / 5,
            }
        )
        if step % 20 == 0 or step in (1, 121):
            share = 1 - (1 - rank_falls_to) * into / 180
            records.append(
                {
                    "kind": "eval",
                    "step": step,
                    "phase": phase,
                    "sft": loss + 0.05,
                    "jepa": ratio + 0.5 * math.exp(-into / 40) if second else None,
                    "trivial_mean": 1.0 if second else None,
                    "trivial_copy": 1.4 if second else None,
                    "ratio": ratio + 0.5 * math.exp(-into / 40) if second else None,
                    "target_std": 0.9 * (0.5 + share / 2) if second else None,
                    "target_std_p5": 0.4 * (0.3 + 0.7 * share) if second else None,
                    "target_rank": 31.2 * share if second else None,
                    "online_std": 0.8,
                    "online_rank": 30.5 * (share if second else 1.0),
                    "embedding_std": 0.7,
                    "embedding_rank": 24.0 * (share if second else 1.0),
                    "distance": 0.02 * (1 - math.exp(-into / 50)) if second else None,
                }
            )
    return records


LABELS = {
    "smbfast": ("smbfast, online encoder", "own"),
    "values": ("counts and values", "baseline"),
    "untrained": ("same backbone, untrained", "baseline"),
    "oracle_filter": ("Bayes filter on the observed history", "oracle"),
}


def task_of(name: str, kind: str = "binary", loss: float = 0.0) -> dict:
    """The record of a task where smbfast is `loss` below counts and values."""
    primary, second = ("auroc", "brier") if kind == "binary" else ("auc", "c_harrell")
    values = {"smbfast": 0.791, "values": 0.791 + loss, "untrained": 0.702, "oracle_filter": 0.842}
    curve = [
        {"predicted": p, "observed": p, "low": p / 2, "high": 2 * p, "num": 60} for p in (0.1, 0.3)
    ]
    return {
        "task": name,
        "kind": kind,
        "rows": {"train": 4100, "tuning": 510},
        "positives": {"train": 803, "tuning": 96},
        "patients": {"tuning": 500},
        "first": {"rows": 500, "positives": 90},
        "prevalence": 96 / 510,
        "unmatched": 14,
        "reason": None,
        "horizons_days": None if kind == "binary" else [30.0, 365.0],
        "competing": None if kind == "binary" else "discharge_alive",
        "models": [
            {
                "name": model,
                "label": label,
                "role": role,
                "versions": 5 if model == "untrained" else 1,
                "primary": interval(values[model]),
                "metrics": {primary: interval(values[model]), second: interval(0.2, 0.01)},
                "curve": curve,
                "chosen": {},
            }
            for model, (label, role) in LABELS.items()
        ],
        "differences": [
            {"model": "smbfast", "against": against, "metric": metric, "rows": rows, "p": 0.01}
            | interval(value, width)
            for against, metric, rows, value, width in (
                ("untrained", primary, "first", 0.089, 0.03),
                ("values", primary, "first", -loss, 0.03),
                ("values", second, "all", -0.018, 0.006),
                ("oracle_filter", primary, "first", -0.051, 0.03),
            )
        ],
        "best": "values",
        "groups": [
            {"by": "sex", "name": sex, "rows": rows, "positives": num, "reason": None}
            | {"models": {"smbfast": interval(0.7), "values": interval(0.8)}}
            | {"difference": interval(-0.1)}
            for sex, rows, num in (("F", 300, 90), ("M", 210, 6))
        ],
        "few_shot": [{"model": "smbfast", "k": k, **interval(0.6)} for k in (8, 16, "all")],
        "incidence": None
        if kind == "binary"
        else {"days": [0, 30, 365], "event": [0, 0.1, 0.2], "competing": [0, 0.4, 0.7]},
    }


def verdict_of(task: str, verdict: str, below: bool = False, text: str = "") -> dict:
    said = {"value": 0.45 if below else 0.791, "rival": 0.8, "difference": interval(-0.1)}
    return {
        "task": task,
        "verdict": verdict,
        "against": "values",
        "label": "counts and values",
        "metric": "auroc",
        "p": 0.002,
        "p_holm": 0.004,
        "below_chance": below,
        "text": text or f"{task}: {verdict} than counts and values.",
        **said,
    }


def probe(task: str = "death_1y", judged_on: str = "tuning") -> dict:
    rare = task_of("rare_event")
    rare |= {"rows": {"train": 400, "tuning": 7}, "positives": {"train": 3, "tuning": 0}}
    rare |= {"patients": {"tuning": 7}, "first": {"rows": 100, "positives": 97}, "groups": []}
    rare |= {"models": [], "differences": [], "best": None, "few_shot": None}
    return {
        "judged_on": judged_on,
        "num_looks": 0,
        "protocol": "L2 logistic regression, penalty chosen on tuning; 200 resamples of subjects.",
        "primary": {"binary": "auroc", "time_to_event": "auc"},
        "headline": [
            verdict_of(task, "worse"),
            verdict_of("progression", "undecided"),
            verdict_of("rare_event", "unmeasured"),
        ],
        "tasks": [
            task_of("progression", "time_to_event"),
            {**rare, "reason": "tuning has one class only"},
            task_of(task, loss=0.1),
        ],
    }


def sample(text: str = "creatinine 1.4 mg/dL") -> dict:
    lines = [{"text": "age 61, female", "kind": "demographics", "part": "context"}]
    for year in range(2018, 2023):
        part = "context" if year < 2021 else "future"
        for kind, words in (
            ("header", f"[{year}-03-11]"),
            ("tag", "<measurements>"),
            ("line", text),
            ("line", "HbA1c 7.2 %"),
            ("tag", "</measurements>"),
        ):
            masked = part == "future" and kind == "line" and words == text
            time = f"{year}-03-11"
            lines.append(
                {"text": words, "kind": kind, "time": time, "masked": masked, "part": part}
            )
    return {
        "subject_id": 17,
        "lines": lines,
        "cut_token": 131,
        "tokens": 214,
        "window": 512,
        "mask_ratio": 0.5,
        "note": "Masked by line here; training masks tokens.",
    }


def run_folder(
    path: Path,
    records: list[dict] | None = None,
    *,
    head: dict | None = None,
    **files: dict | str,
) -> Path:
    """A run folder; `files` are written as `name.json`, or `name.toml` when they are text."""
    path.mkdir(parents=True)
    records = metrics() if records is None else records
    end = [{"kind": "end", "seconds": 192.4}]
    lines = [json.dumps(record) for record in [head or header(), *records, *end]]
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    for name, content in files.items():
        if isinstance(content, str):
            (path / f"{name}.toml").write_text(content)
        else:
            (path / f"{name}.json").write_text(json.dumps(content))
    return path


def whole(path: Path, **files: Any) -> Path:
    defaults = {
        "probe": probe(),
        "sample": sample(),
        "status": {"state": "done", "step": 300},
        "config": '[data]\npath = ""\n\n[[phases]]\nname = "sft"\nsteps = 120\n',
    }
    return run_folder(path, **{**defaults, **files})


def read(run: Path) -> tuple[str, Page]:
    source = write_report(run).read_text(encoding="utf-8")
    return source, Page(source)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Plots of training are left out, and of those of tasks only their names are noted."""
    for name in ("losses", "health", "optimizer", "machine"):
        monkeypatch.setattr(figures, name, lambda _phases: None)
    drawn: list[str] = []

    def noted(name: str, *_args: object, **_options: object) -> str:
        drawn.append(name)
        return "<svg/>"

    monkeypatch.setattr(comparisons, "panel", noted)
    return drawn


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run with its report written; not to be changed."""
    folder = whole(tmp_path_factory.mktemp("runs") / "default")
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def source(run: Path) -> str:
    return (run / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(source: str) -> Page:
    return Page(source)


def test_whole_run(source: str, page: Page) -> None:
    assert "Finished: 300 of 300 steps on 1,200 simulated subjects (1,204,551 tokens)" in page.text
    assert "in 3 min 12 s." in page.text
    assert "No signs of collapse in phase “jepa”" in page.text
    assert (
        "0.791 [0.761, 0.821]" in page.text and "same backbone, untrained (mean of 5)" in page.text
    )
    assert "+0.089 [+0.059, +0.119]" in page.text
    assert "Not measurable: tuning has one class only" in page.text
    assert "Judged on tuning patients" in page.text and "of the tuning split" in page.text
    assert "tuning: 510 rows of 500 patients, 96 positive (18.8%)" in page.text
    assert "horizons: 30, 365 days" in page.text and "competing event: discharge_alive" in page.text
    assert "not for the C-index" in page.text  # what the filter bounds
    assert "SIM//misc" in page.text and "cut: the future begins" in page.text
    assert source.count("<svg") == 23  # 12 of training, 5 of a binary task, 6 of time to event
    assert source.count('class="line hidden"') == 3  # two masked lines and the legend


def test_tasks_stand_in_the_order_of_the_verdicts(source: str, page: Page) -> None:
    """The table of verdicts comes first, then the tasks, the worst of them first, each with its
    sentence; then training and health, and data and settings at the end."""
    names = ("death_1y", "progression", "rare_event")
    order = [page.text.index("best rival")]
    for name in names:
        order += [page.text.index(f"{name} · "), page.text.index(f"{name}: ")]
    assert order == sorted(order)
    sections = re.findall(r'<section id="(\w+)">', source)
    assert sections == ["probe", "loss", "collapse", "machine", "timeline", "data", "config"]


def test_differences_to_the_best_say_better_worse_or_neither(source: str) -> None:
    rows = re.findall(
        r'row">smbfast, online encoder</th><td data-name="metric">(.*?)</td>'
        r'<td data-name="nodes">(.*?)</td>.*">(.*?)</td></tr>',
        source,
    )
    assert rows == [
        ("AUROC", "first nodes", "worse"),
        ("Brier score", "all nodes", "better"),  # lower, and that is better
        ("mean AUC over time", "first nodes", "undecided"),
        ("Harrell's C".replace("'", "&#39;"), "all nodes", "worse"),
    ]


@pytest.mark.parametrize("every", [1, 10])
def test_captions_say_what_was_logged(tmp_path: Path, undrawn: list[str], every: int) -> None:
    """Counted here from metrics.jsonl itself."""
    records = [r for r in metrics() if r["kind"] == "eval" or r["step"] % every == 0]
    run = whole(tmp_path / "run", records=records)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps, evals = ([r for r in lines if r["kind"] == kind] for kind in ("step", "eval"))
    said = took.captions(read_run(run))
    if every == 1:
        assert said["steps"].startswith(f"Every step was logged: {len(steps)} of 300.")
    else:
        assert f"drawn: {len(steps)} of 300, mostly one in {every}." in said["steps"]
        assert "every step" not in " ".join(said.values()).lower() + read(run)[1].text.lower()
    assert said["losses"].startswith(said["steps"].split(".")[0])
    assert f"{len(evals)} evaluations" in said["health"] and said["health"] in said["losses"]


def test_what_a_run_took_is_said(tmp_path: Path, undrawn: list[str]) -> None:
    """Of a run of an earlier version, without these figures, nothing is."""
    head = header(window_tokens=1_204_551)
    head |= {"digests": {"data": "5eed" * 4}, "memory": {"before": 0.5, "predicted": 0.7}}
    more = {"tokens": 3_000_000, "epochs": 2.4906, "flops": 41 * 10**12, "matmul": 0.25}
    status = {"state": "done", "command": "smbfast train x"}
    records = [{**r, **more} if r["kind"] == "step" else r for r in metrics()]
    source, _ = read(whole(tmp_path / "run", records=records, head=head, status=status))
    shown = dict(re.findall(r"<dt>([^<]*)</dt><dd[^>]*>([^<]*)</dd>", source))
    assert (shown["tokens seen"], shown["epochs"], shown["FLOPs"]) == ("3 M", "2.49", "41 T")
    assert (shown["peak memory"], shown["command"]) == ("1.50 GiB", "smbfast train x")
    assert shown["fingerprint of the data"] == "5eed" * 4
    cells = dict(re.findall(r'<th scope="row">([^<]*)</th><td>([^<]*)</td>', source))
    assert "2.491: tokens seen over the 1,204,551 tokens" in cells["epochs"]
    assert "25% of this device" in cells["FLOPs"] and cells["memory, measured"].startswith("1.50")
    assert cells["memory, predicted"].startswith("0.70 GiB for")
    assert cells["memory, predicted"].endswith("before, 1.00 GiB")
    assert "memory, at the end" not in cells  # which this end did not record
    old = read(whole(tmp_path / "old"))[0]
    assert not re.search("tokens seen|epochs<|FLOPs|memory, predicted|fingerprint", old)


def test_a_figure_below_chance_is_the_red_first_sentence(
    tmp_path: Path, undrawn: list[str]
) -> None:
    record = probe()
    record["headline"].insert(0, verdict_of("x", "worse", True, "x: BELOW CHANCE and worse."))
    source, _ = read(whole(tmp_path / "run", probe=record))
    body = source[source.index("<main>") :]
    alarm = body.index('<p class="finding bad alarm">x: BELOW CHANCE and worse.</p>')
    assert alarm < body.index("Finished: 300") < body.index("death_1y: worse")
    assert '<p class="finding bad">death_1y: worse' in body
    assert '<p class="finding unknown">progression' in body
    assert re.search(r'">x <span.*tag bad">below chance<', body)


def test_a_record_of_an_older_version_is_said_to_be_one(tmp_path: Path, undrawn: list[str]) -> None:
    record = probe()
    del record["headline"]
    _, page = read(whole(tmp_path / "run", probe=record))
    assert "probe.json is of an older version" in page.text
    assert "0.791" not in page.text and "death_1y" not in page.text


def colours(css: str) -> dict[str, tuple[float, ...]]:
    found = re.findall(r"--([\w-]+): #([0-9a-f]{6});", css)
    return {name: tuple(int(c[i : i + 2], 16) / 255 for i in (0, 2, 4)) for name, c in found}


def luminance(colour: tuple[float, ...]) -> float:
    """Relative luminance as WCAG 2.2 defines it."""
    parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def test_text_is_legible_by_day_and_by_night(source: str) -> None:
    """Contrast of 4.5 at least, which WCAG 2.2 asks of text (level AA)."""
    day, night = (colours(part) for part in source.split("prefers-color-scheme: dark")[:2])
    assert day.keys() == night.keys()
    pairs = [(t, g) for t in ("ink", "soft", "good", "warn", "bad") for g in ("paper", "wash")]
    pairs += [("bad", "bad-wash"), ("blue", "paper"), ("truth", "hidden"), ("ink", "next")]
    pairs += [("ink", "hidden"), ("soft", "band"), ("soft", "dark-band")]
    for theme in (day, night):
        for text, ground in pairs:
            low, high = sorted(luminance(theme[name]) for name in (text, ground))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground)


WRONG = """<html><body style="margin: 0; background: #fff"><p style="font-size: 8.9px">a</p>
<svg viewBox="0 0 200 20" style="width: 100px; display: block"><rect width="200" height="20"
fill="#999"/><text y="15" style="font-size: 17px; fill: #444">b</text></svg>
<div style="width: 2000px; background: #000">c</div><script></script></body></html>"""


@pytest.mark.skipif(chromium() is None, reason="no Chromium on the PATH to show the page")
def test_a_browser_shows_it_on_a_phone_and_at_a_desk_by_day_and_by_night(
    run: Path, tmp_path: Path
) -> None:
    """Nothing scrolls to the side, no text is below 9 px or of a contrast below 4.5; and faults
    that a page does have are seen."""
    page = run / "report.html"
    results = measured([page])[page]
    assert [(m.width, m.scheme) for m in results] == [(w, s) for w in WIDTHS for s in SCHEMES]
    assert [fault for m in results for fault in m.faults()] == []
    wrong = tmp_path / "wrong.html"
    wrong.write_text(WRONG)
    with Chromium() as browser:
        browser.open(wrong, 1280, "light")
        measure = browser.measure(1280, "light")
    assert (measure.beyond, measure.num_scripts) == (720, 1) and measure.wide
    assert (measure.size, measure.smallest) == (pytest.approx(8.5), "b")  # half of 17
    assert (measure.contrast, measure.faintest) == (1, "c") and len(measure.faults()) == 4


def test_opens_offline(source: str, page: Page) -> None:
    assert "<script" not in source.lower()
    assert not {"script", "link", "img", "iframe", "object", "embed", "base"} & set(page.tags)
    for key, value in page.attributes:
        assert not key.startswith("on")
        if key in ("src", "href", "xlink:href", "srcset", "action"):
            assert value.startswith("#"), (key, value)
    assert re.findall(r"url\((?!#)", source) == [] and "@import" not in source
    assert re.findall(r'(?<!xmlns=")(?<!xmlns:xlink=")https?://', source) == []


def test_ids_are_unique_and_links_meet_one(source: str, page: Page) -> None:
    ids = [value for key, value in page.attributes if key == "id"]
    assert len(ids) == len(set(ids)) > 30
    targets = re.findall(r"url\(#([^)]*)\)", source)
    targets += [value[1:] for key, value in page.attributes if key == "href"]
    assert targets and set(targets) <= set(ids)


def test_hostile_text_is_inert(tmp_path: Path) -> None:
    records = [{**record, "phase": HOSTILE + record["phase"]} for record in metrics()]
    tasks = probe(HOSTILE)
    tasks["tasks"][0]["models"][0]["label"] = HOSTILE
    tasks["tasks"][1]["reason"] = tasks["protocol"] = HOSTILE
    tasks["tasks"][0]["groups"][0]["name"] = tasks["tasks"][0]["competing"] = HOSTILE
    tasks["headline"][0]["text"] = tasks["headline"][0]["label"] = HOSTILE
    run = run_folder(
        tmp_path / "run",
        records,
        head={**header(codes={HOSTILE: HOSTILE}), "model": HOSTILE, "versions": {HOSTILE: HOSTILE}},
        probe=tasks,
        sample={**sample(HOSTILE + "\x1b[31m\x00\ud800"), "note": HOSTILE},
        status={"state": "failed", "command": HOSTILE},
        config=HOSTILE,
    )
    source, page = read(run)
    assert "<script" not in source.lower() and "<img" not in source.lower()
    assert not {"script", "img"} & set(page.tags)
    assert not [key for key, _ in page.attributes if key.startswith("on")]
    assert not [value for _, value in page.attributes if "evil" in value and value[0] == "h"]
    assert "alert(1)" in page.text  # shown as the text it is
    assert "\x1b" not in source and "\x00" not in source


def test_small_counts_are_not_told(tmp_path: Path, undrawn: list[str]) -> None:
    head = header(
        simulated=False,
        subjects={"train": 1200, "tuning": 4, "held_out": 9},
        unmapped={"codes": {"RARE": 8}, "list": [["RARE", 6]]},
    )
    source, page = read(run_folder(tmp_path / "run", head=head, probe=probe()))
    cells = dict(re.findall(r'<th scope="row">([^<]*)</th><td>([^<]*)</td>', source))
    assert cells["subjects · tuning"] == cells["subjects · held out"] == "≤10"
    assert cells["unmapped · codes · RARE"] == "≤10"
    assert cells["unmapped · list"] == "RARE, ≤10"
    assert cells["subjects · train"] == "1,200"
    assert cells["model · layers"] == "4"  # counts nobody
    assert "train: 400 rows, ≤10 positive" in page.text
    assert "tuning: ≤10 rows of ≤10 patients, 0 positive" in page.text
    # 97 of 100: the three negatives would be known by subtraction
    assert "first nodes, judged: 100 rows, all but ≤10 positive" in page.text
    # 6 of 96: so would they from the other group
    groups = re.findall(r"by sex: (.)</th><td.*?>(.*?)</td><td.*?>(.*?)</td>", source)
    assert set(groups) == {("F", "300", "–"), ("M", "210", "≤10")}


@pytest.mark.parametrize("positives, clear", [(11, True), (10, False), (3, False), (490, False)])
def test_no_curve_of_shares_tells_of_few_patients(
    tmp_path: Path, undrawn: list[str], positives: int, clear: bool
) -> None:
    """Each step of an incidence, and a point of a calibration, would be a count of them."""
    small = probe()
    small["tasks"] = [task_of("death_1y")]
    small["tasks"][0] |= {"rows": {"tuning": 500}, "positives": {"tuning": positives}}
    source, _ = read(run_folder(tmp_path / "run", head=header(), probe=small))
    assert ("Calibration and incidence are not drawn" in source) is not clear
    assert source.count("<svg") == len(undrawn) - (not clear)


def test_held_out_figures_are_shown_with_final_alone_and_counted(
    tmp_path: Path, undrawn: list[str]
) -> None:
    run = whole(tmp_path / "run", probe=probe(judged_on="held_out"))
    source, page = read(run)
    assert "The probes were judged on held-out patients" in page.text
    for figure in ("0.791", "0.089", "96 positive", "4,100", "worse than", "resamples"):
        assert figure not in page.text
    assert not undrawn and not (run / "held_out.json").exists()
    main([f"--run={run}", "--final"])
    main([f"--run={run}", "--final"])
    shown = Page((run / "report.html").read_text()).text
    assert "0.791 [0.761, 0.821]" in shown and "train: 4,100 rows, 803 positive" in shown
    assert "death_1y: worse than counts and values." in shown
    assert "Judged on held-out patients, who were looked at 2 times" in shown
    assert "of the held-out split" in shown and len(undrawn) == 22
    looks = json.loads((run / "held_out.json").read_text())["looks"]
    assert [look["command"] for look in looks] == [
        f"python -m smbfast.report --run={run} --final"
    ] * 2
    hidden = read(run)[0]
    assert hidden.replace(" Held-out patients were looked at 2 times in this run.", "") == source
    old = probe()
    del old["judged_on"]
    (run / "probe.json").write_text(json.dumps(old))
    assert "0.791" not in read(run)[1].text  # of a version that judged on held_out alone


def test_real_patients_are_never_shown(tmp_path: Path, undrawn: list[str]) -> None:
    head = header(simulated=False)
    _, page = read(run_folder(tmp_path / "run", head=head, sample=sample("secret finding")))
    assert "Real patients are never shown" in page.text
    assert "secret finding" not in page.text


def test_missing_files_are_said(tmp_path: Path, undrawn: list[str]) -> None:
    _, page = read(run_folder(tmp_path / "run"))
    assert "no readable probe.json" in page.text
    assert "Real patients are never shown" in page.text
    assert "no config.toml" in page.text


def test_without_jepa(tmp_path: Path) -> None:
    _, page = read(run_folder(tmp_path / "run", metrics(jepa=False)))
    assert "No signs of collapse in phase “sft”" in page.text
    assert "Latent prediction loss" not in page.text and "Next-token loss" in page.text


@pytest.mark.parametrize("kept", [0, 1])
def test_hardly_begun(tmp_path: Path, kept: int) -> None:
    steps = [record for record in metrics() if record["kind"] == "step"][:kept]
    _, page = read(run_folder(tmp_path / "run", steps))
    assert f"{kept} of 300 steps" in page.text


def test_broken_lines_and_files_are_left_out(tmp_path: Path, undrawn: list[str]) -> None:
    run = whole(tmp_path / "run")
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text[: text.rindex('{"kind": "end"')] + '{"kind": "st')
    (run / "probe.json").write_text('{"tasks": [')
    (run / "status.json").write_text('{"state": "preempted", "command": "go on with this"}')
    _, page = read(run)
    assert "Not finished, preempted: 300 of 300 steps" in page.text
    assert "go on with this" in page.text
    assert "1 line of metrics.jsonl could not be read" in page.text
    assert "probe.json could not be read" in page.text


def test_values_of_the_wrong_type_do_not_stop_it(tmp_path: Path) -> None:
    wrong = [
        {"kind": "step", "step": 1, "phase": None, "sft": "x", "lr": [], "wait": math.nan},
        {"kind": "step", "step": "two", "phase": "sft", "sft": 1.0},
        {"kind": "eval", "step": 1, "phase": None, "target_rank": 1e400, "ratio": {}},
    ]
    bad = {"tasks": [{"models": [{"metrics": {"auroc": 3}}, 7], "rows": [], "differences": [{}]}]}
    lines = {"lines": [{}, 4, {"text": None, "masked": "yes"}]}
    _, page = read(run_folder(tmp_path / "run", wrong, probe=bad, sample=lines))
    assert "1 of 300 steps" in page.text


def finding_of(tmp_path: Path, records: list[dict]) -> Finding:
    return collapse(read_run(run_folder(tmp_path / "run", records)).phases)


@pytest.mark.parametrize(
    ("share", "level", "words"),
    [
        (0.52, "good", "No signs of collapse"),
        (0.45, "warn", "effective rank of the states of the online encoder fell to 45 %"),
        (0.09, "bad", "The run collapsed in phase “jepa”"),
    ],
)
def test_collapse_flips_where_the_rank_passes_half_and_a_tenth(
    tmp_path: Path, share: float, level: str, words: str
) -> None:
    finding = finding_of(tmp_path, metrics(rank_falls_to=share))
    assert finding.level == level and words in finding.text


@pytest.mark.parametrize("kind", ["online", "embedding"])
def test_states_that_are_nearly_constant_have_collapsed_at_that_evaluation(
    tmp_path: Path, kind: str
) -> None:
    """In a phase of SFT alone too, whatever losses and ranks say, and also where it recovers."""
    records = metrics(jepa=False)
    evals = [r for r in records if r["kind"] == "eval"]
    evals[2][f"{kind}_std"] = 0.0099
    finding = finding_of(tmp_path, records)
    assert finding.level == "bad" and "nearly constant" in finding.text
    assert "target" not in finding.text
    entry, later = evals[0], evals[1]
    assert alarms(entry, [later], jepa=False) == []
    assert [f.level for f in alarms(entry, [evals[2]], jepa=False)] == ["bad"]


def test_random_weights_are_no_reference(tmp_path: Path) -> None:
    records = metrics(jepa=False)
    entry = next(r for r in records if r["kind"] == "eval")
    entry["online_rank"] = 90.0
    assert finding_of(tmp_path / "a", records).level == "warn"
    entry["untrained"] = True
    assert finding_of(tmp_path / "b", records).level == "good"


@pytest.mark.parametrize(
    ("r2", "copied", "level", "words"),
    [
        (0.35, 0.05, "good", "R² of the latent loss is 0.35"),
        (0.04, 0.05, "warn", "no better than copying"),
        (-0.1, -0.2, "warn", "no better than a constant"),
    ],
)
def test_horizon_jepa_is_compared_with_copying(
    tmp_path: Path, r2: float, copied: float, level: str, words: str
) -> None:
    latent = {"r2": r2, "r2_copy": copied, "r2_30d": r2, "r2_copy_30d": copied, "ratio": None}
    nothing = {"trivial_mean": None, "trivial_copy": None}
    records = [{**r, **latent, **nothing} if r["phase"] == "jepa" else r for r in metrics()]
    finding = finding_of(tmp_path, records)
    assert finding.level == level and words in finding.text


def test_the_page_shows_the_probe_the_horizons_and_the_gradients(tmp_path: Path) -> None:
    more = {"r2": 0.3, "r2_copy": 0.05, "r2_30d": 0.3, "r2_copy_30d": 0.05, "codes_gain": 0.1}
    more |= {"probe_task": HOSTILE, "probe_auroc": 0.7, "codes": 1.5}
    more |= {"grad_sft": 0.9, "grad_jepa": 0.3, "cos_sft_jepa": 0.02}
    records = [{**r, **more} if r["phase"] == "jepa" else r for r in metrics()]
    page_source, page = read(run_folder(tmp_path / "run", records))
    assert "<script" not in page_source
    for text in (
        "R², 30d, copying the state",
        "probe AUROC on tuning nodes",
        "cosine of the gradients of sft and jepa",
        "codes to come: gain over prevalence",
        "R² of the latent loss by horizon",
        "Gradient of each loss on the trunk",
        "Effective rank since phase entry",
        "Codes to come",
    ):
        assert text in page.text


@pytest.mark.parametrize(
    ("ratio", "level", "words"),
    [(0.8, "good", "No signs"), (0.94, "warn", "hardly better"), (1.1, "warn", "no better than")],
)
def test_collapse_reads_the_trivial_predictors(
    tmp_path: Path, ratio: float, level: str, words: str
) -> None:
    finding = collapse(read_run(run_folder(tmp_path / "run", metrics(ratio=ratio))).phases)
    assert finding.level == level and words in finding.text


def test_ratio_is_computed_where_it_was_not_logged(tmp_path: Path) -> None:
    records = [{**r, "ratio": None, "trivial_mean": 0.5} for r in metrics(ratio=0.6)]
    finding = collapse(read_run(run_folder(tmp_path / "run", records)).phases)
    assert finding.level == "warn" and "1.21 of the best trivial" in finding.text


def test_a_resumed_run_counts_each_step_once(tmp_path: Path) -> None:
    again = [{**record, "sft": 9.0} for record in metrics() if 100 < record["step"] <= 140]
    rest = [record for record in metrics() if record["step"] > 140]
    before = [record for record in metrics() if record["step"] <= 125]
    run = read_run(run_folder(tmp_path / "run", [*before, *again, *rest]))
    assert [(phase.name, phase.start, phase.end) for phase in run.phases] == [
        ("sft", 0, 120),
        ("jepa", 120, 300),
    ]
    steps = [record for phase in run.phases for record in phase.steps]
    assert [record["step"] for record in steps] == list(range(1, 301))
    assert steps[110]["sft"] == 9.0  # the later record stands


@pytest.mark.parametrize("made", [False, True])
def test_a_folder_that_is_no_run(tmp_path: Path, made: bool) -> None:
    run = tmp_path / "run"
    if made:
        run.mkdir()
    with pytest.raises(ValueError, match=f"{re.escape(str(run))}.*no"):
        write_report(run)
    assert not (run / "report.html").exists()
    with pytest.raises(SystemExit, match="run must be"):
        main([f"--run={run}"])


def test_metrics_without_a_readable_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{")
    with pytest.raises(ValueError, match="no readable line"):
        write_report(tmp_path)


def test_command_writes_the_same_bytes_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = (run / "report.html").read_bytes()
    (run / "report.html").unlink()
    main([f"--run={run}"])
    assert capsys.readouterr().out == f"report: {run / 'report.html'}\n"
    assert (run / "report.html").read_bytes() == first
