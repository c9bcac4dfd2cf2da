"""A model for others: its card, what goes to the Hub and comes back, and what other tools load."""

import inspect
import json
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import smbfast
from smbfast import embed, push, train
from smbfast.base.files import MANIFEST, verify_folder
from smbfast.base.replace import foreign
from smbfast.data.tokens import train_tokenizer
from smbfast.run.checkpoint import write_card
from smbfast.run.hub import MODEL_FILES
from smbfast.run.model_card import merged_card, model_card, shared_card
from smbfast.run.shipping import shipment_of
from smbfast.settings import load, push_arguments
from tests.factory import split_rows, table_of, write_meds
from tests.hub_server import COMMIT, hub
from tests.ops.tolerance import rounding
from tests.refusal import refused
from tests.tiny import tiny_lm

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_report")]

NAME = "org/name"
HF_API = huggingface_hub.HfApi  # before a test puts its own there
PLAIN = rounding(2 * 7 * 24)  # two layers of seven products of at most 24 terms, written otherwise
PROBE = {
    "judged_on": "tuning",
    "num_looks": 0,
    "headline": [{"task": "b", "text": "b: worse."}, {"task": "a", "text": "a: better."}],
    "tasks": [
        {
            "task": name,
            "kind": "binary",
            "first": {"rows": 240, "positives": positives},
            "best": "counts",
            "models": [
                {"name": model, "label": label, "metrics": {"auroc": cell}}
                for model, label, cell in (
                    ("smbfast", "smbfast", {"value": 0.8125, "low": 0.75, "high": 0.875}),
                    ("counts", "code counts", {"value": 0.75, "low": 0.5, "high": None}),
                )
            ],
        }
        for name, positives in (("a", 11), ("b", 229), ("few", 10), ("most", 230), ("odd", "<=10"))
    ],
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, no_report: None) -> Path:
    """`base`, a backbone with an untied head; `run`, LoRA on it in codes, and merged."""
    home = tmp_path_factory.mktemp("home")
    tokenizer = train_tokenizer([f"word{i} value {i}.5, glucose\n" for i in range(60)], 400)
    tokenizer.save_pretrained(home / "base")
    more = {"vocab_size": len(tokenizer), "max_position_embeddings": 2048}
    tiny_lm("llama", tie=False, **more).save_pretrained(home / "base")
    write_meds(home / "data")
    train.main(
        [
            "tiny",
            f"--data.path={home / 'data'}",
            f"--run.dir={home / 'run'}",
            f"--model.path={home / 'base'}",
            *("--data.format=codes", "--lora.r=4", "--run.export=merged", "--run.threads=1"),
            *("--phases.0.steps=1", "--phases.1.steps=1", "--objective.self_check=false"),
            *("--probe.labels=[]", "--probe.pool=last"),
        ]
    )
    return home


@pytest.fixture(scope="module")
def final(home: Path) -> Path:
    return home / "run" / "final"


class Api:
    """What `HfApi` does to a repository, in a folder, from which `tests.hub_server` answers."""

    root: Path
    is_public = False

    def __getattribute__(self, name: str) -> Any:
        """A method that takes what that of the library takes."""
        value = object.__getattribute__(self, name)
        if not callable(value) or name.startswith("_"):
            return value

        def bound(*words: Any, **more: Any) -> Any:
            inspect.signature(getattr(HF_API, name)).bind(None, *words, **more)
            return value(*words, **more)

        return bound

    def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> None:
        assert exist_ok and (private or self.is_public)
        (self.root / name / COMMIT).mkdir(parents=True, exist_ok=True)

    def model_info(self, name: str) -> Any:
        return SimpleNamespace(private=not self.is_public)

    def list_repo_files(self, name: str) -> list[str]:
        return [file.name for file in (self.root / name / COMMIT).iterdir()]

    def create_commit(self, name: str, operations: list[Any], *, commit_message: str) -> Any:
        assert commit_message
        for operation in operations:
            file = self.root / name / COMMIT / operation.path_in_repo
            content = getattr(operation, "path_or_fileobj", None)
            if content is None:
                file.unlink()
            else:
                file.write_bytes(
                    content if isinstance(content, bytes) else Path(content).read_bytes()
                )
        return SimpleNamespace(oid=COMMIT)


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[Api]:
    kind = type("FakeApi", (Api,), {"root": tmp_path / "hub"})
    monkeypatch.setattr("huggingface_hub.HfApi", kind)
    return kind


def pushed(folder: Path, *words: str) -> None:
    push.main([str(folder), f"--to={NAME}", *words])


def card_of(folder: Path, probe: dict | None) -> str:
    record = json.loads((folder / "smbfast.json").read_text())
    prepared = json.loads((folder.parent / "prepared" / "prepare.json").read_text())
    settings = load(str(folder.parent / "config.toml"), [])
    best = {"sft": {"step": 1, "loss": 2.0}}
    return model_card(record, folder, prepared, best, settings, target=True, probe=probe)


def test_a_card_is_filled_from_the_run(home: Path, final: Path) -> None:
    card = ModelCard.load(final / "README.md")
    data, record = card.data, json.loads((final / "smbfast.json").read_text())
    assert (data.library_name, data.license, data.license_name) == ("peft", "other", "not-decided")
    assert data.base_model is None  # a folder of this machine, whose path is in no card
    assert str(home) not in card.content
    for text in (record["data_digest"], record["weights_digest"][:12], "sft: 1 steps of SFT x 1"):
        assert text in card.text, text
    assert "rank 4, alpha 32" in card.text and "## Out of scope" in card.text
    assert data.eval_results is None and "AUROC" not in card.text


def test_figures_of_a_card_have_intervals_and_no_small_cell(final: Path) -> None:
    text = card_of(final, PROBE)
    card = ModelCard(text)
    shown = [(r.dataset_config, r.metric_type, r.metric_value) for r in card.data.eval_results]
    assert shown == [("a", "roc_auc", 0.8125), ("b", "roc_auc", 0.8125)]
    assert card.data.eval_results[0].metric_args == {"interval_95": [0.75, 0.875]}
    assert "| a | AUROC | 0.812 [0.750, 0.875] | 0.750, code counts | about 240 |" in text
    assert "as ten tuning patients or fewer" in text and "have it not: few, most, odd." in text
    assert text.index("b: worse") < text.index("a: better")  # as the probes order them
    assert "Figures are of tuning patients" in text and "Held-out patients have not been" in text
    final_text = card_of(final, {**PROBE, "judged_on": "held_out", "num_looks": 2})
    assert "Figures are of held-out patients" in final_text and "looked at 2 times" in final_text
    assert "Read-out, penalty" not in final_text
    assert ModelCard(final_text).data.eval_results[0].dataset_split == "held_out"
    assert "no task of which figures can be shown" in card_of(final, None)


def test_a_card_that_somebody_edited_stays(final: Path, tmp_path: Path) -> None:
    copy = copied(final, tmp_path / "final")
    before = (copy / MANIFEST).read_text()
    write_card(copy, "# Anew\n")
    assert (copy / "README.md").read_text() == "# Anew\n" and not foreign(copy)
    after = json.loads((copy / MANIFEST).read_text())
    assert after["files"] == json.loads(before)["files"] and verify_folder(copy)
    (copy / "README.md").write_text("# Ours\n")
    write_card(copy, "# Again\n")
    assert (copy / "README.md").read_text() == "# Ours\n"


def copied(folder: Path, to: Path) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def test_what_is_pushed_comes_back_and_embeds_to_the_same_bits(
    home: Path, final: Path, api: type[Api], tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    pushed(final, "--target")
    pushed(final)  # what an earlier commit had and this one has not is removed
    said = capsys.readouterr().out
    assert "left here: target.safetensors" in said
    assert f"pushed: https://huggingface.co/{NAME}/tree/{COMMIT}" in said
    repository = api.root / NAME / COMMIT
    names = {file.name for file in repository.iterdir()}
    assert names == {f.name for f in final.iterdir()} - {"target.safetensors"}
    assert {name for name in names if f"  {name}\n" not in said} == set()
    for file in repository.iterdir():
        assert str(home).encode() not in file.read_bytes(), file.name
    record = json.loads((repository / "smbfast.json").read_text())
    assert record["backbone"] == "base" and "pool_choice" not in record
    assert f'smbfast.load("{NAME}"' in (repository / "README.md").read_text()
    monkeypatch.undo()
    out = tmp_path / "embeddings.parquet"
    with hub(api.root, tmp_path / "cache", monkeypatch):
        by_name = [f"--model={NAME}@{COMMIT}", f"--model.path={home / 'base'}", "--device=cpu"]
        embed.main([*by_name, f"--data={home / 'data'}", "--at=last", f"--out={out}"])
        events = table_of(split_rows("held_out"))
        ours, theirs = (
            smbfast.load(folder, revision=commit, path=home / "base", device="cpu")
            for folder, commit in ((final, None), (NAME, "main"))
        )
    expected = ours.embed(home / "data", at="last").table
    assert pq.read_table(out).equals(expected)
    assert theirs.embed(events, at="last").table.equals(ours.embed(events, at="last").table)


def test_a_dry_run_opens_no_socket(final: Path, monkeypatch: Any, capsys: Any) -> None:
    def opened(*_words: Any, **_more: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", opened)
    pushed(final, "--dry-run", "--base", "org/backbone", "--license=apache-2.0", "--public")
    assert "nothing was sent" in capsys.readouterr().out


def test_a_name_of_the_backbone_and_a_license_stand_in_what_goes_out(
    final: Path, api: type[Api]
) -> None:
    api.is_public = True
    pushed(final, "--base=org/backbone", "--license=apache-2.0", "--public")
    repository = api.root / NAME / COMMIT
    config = json.loads((repository / "adapter_config.json").read_text())
    record = json.loads((repository / "smbfast.json").read_text())
    assert config["base_model_name_or_path"] == record["backbone"] == "org/backbone"
    card = ModelCard.load(repository / "README.md")
    assert (card.data.base_model, card.data.license) == ("org/backbone", "apache-2.0")
    assert card.data.license_name is None and "apache-2.0. It depends" in card.text
    assert f'smbfast.load("{NAME}")' in card.text
    assert verify_folder(repository) and config["revision"] is None
    refused(lambda: smbfast.load(repository), "`hf download org/backbone` fetches it")


def test_a_whole_model_goes_out_without_the_place_of_its_backbone(
    final: Path, tmp_path: Path
) -> None:
    folder = copied(final, tmp_path / "final")
    edit(folder / "smbfast.json", {"trains": "all", "backbone": "/disk/hospital/base"})
    edit(folder / "adapter_config.json", {"base_model_name_or_path": "base"})
    reseal(folder)
    shipped = shipment_of(push_arguments([str(folder), f"--to={NAME}"])).files["smbfast.json"]
    assert isinstance(shipped, bytes) and json.loads(shipped)["backbone"] == "base"


def test_a_backbone_of_the_hub_is_known_by_name_and_commit(
    home: Path, final: Path, api: type[Api], tmp_path: Path, monkeypatch: Any
) -> None:
    root = tmp_path / "models--org--backbone"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    (root / "snapshots").mkdir()
    copied(home / "base", root / "snapshots" / COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    pushed(final, "--base=org/backbone")
    repository = api.root / NAME / COMMIT
    for name, key in (("smbfast", "backbone_revision"), ("adapter_config", "revision")):
        assert json.loads((repository / f"{name}.json").read_text())[key] == COMMIT
    events = table_of(split_rows("held_out"))
    ours = smbfast.load(final, device="cpu").embed(events, at="last").table
    (root / "refs" / "main").write_text("1" * 40)  # the branch has moved on
    assert smbfast.load(repository, device="cpu").embed(events, at="last").table.equals(ours)


def edit(file: Path, change: dict) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


def reseal(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    from smbfast.base.replace import sha256

    for name in manifest["files"]:
        file = folder / name
        manifest["files"][name] = (file.stat().st_size, sha256(file))
    (folder / MANIFEST).write_text(json.dumps(manifest))


SMALL = "Of the patients, 7 patients died.\n"
REFUSED: dict[str, tuple[Any, list[str], tuple[str, ...]]] = {
    "predictions": (lambda f: (f / "p.parquet").write_text("x"), [], ("p.parquet",)),
    "a sample": (lambda f: (f / "sample.json").write_text("{}"), [], ("sample.json",)),
    "notes": (lambda f: (f / "notes.md").write_text("x"), [], ("notes.md",)),
    "a small cell": (lambda f: add(f / "README.md", SMALL), [], ("README.md, line", "10 people")),
    "a small word": (lambda f: add(f / "README.md", "Three women died.\n"), [], ("10 people",)),
    "a small row": (lambda f: add(f / "README.md", "| women | 3 |\n"), [], ("README.md, line",)),
    "a small part": (lambda f: add(f / "README.md", "4 of 20 patients died\n"), [], ("10 people",)),
    "a small group": (lambda f: add(f / "README.md", "n=3 male patients\n"), [], ("10 people",)),
    "no card": (lambda f: (f / "README.md").unlink(), [], ("must hold a card",)),
    "a rare entry": (
        lambda f: edit(f / "codes.json", {"vocabulary": {"min_subjects": 9}}),
        [],
        ("codes.json", "at least 10", "9"),
    ),
    "a path": (
        lambda f: edit(f / "tokenizer_config.json", {"name_or_path": str(f.resolve())}),
        [],
        ("tokenizer_config.json", "no path"),
    ),
    "a path elsewhere": (
        lambda f: edit(f / "tokenizer_config.json", {"more": [{"name": "/disk/hospital/base"}]}),
        [],
        ("tokenizer_config.json", "no path"),
    ),
    "damaged": (lambda f: add(f / "predictor.safetensors", "x"), ["as it is"], ("predictor",)),
    "public without a license": (lambda f: None, ["--public"], ("license", "--license=NAME")),
    "another backbone": (lambda f: None, ["--base=org/other"], ("org/other", "digest")),
}


def add(file: Path, text: str) -> None:
    with file.open("a") as stream:
        stream.write(text)


@pytest.mark.parametrize("case", REFUSED)
def test_what_must_not_go_out_is_refused(
    home: Path, final: Path, api: type[Api], tmp_path: Path, monkeypatch: Any, case: str
) -> None:
    change, words, said = REFUSED[case]
    folder = copied(final, tmp_path / "final")
    change(folder)
    if words != ["as it is"]:
        reseal(folder)
    monkeypatch.setattr("smbfast.run.shipping.local_model", lambda name: home / "data")
    if case == "another backbone":
        monkeypatch.setattr("smbfast.base.digests.weights_digest", lambda *_words: "0" * 64)
    refused(lambda: pushed(folder, *(w for w in words if w[0] == "-")), *said)
    assert not api.root.exists()


def test_a_mistake_of_ours_is_no_answer_of_the_hub(final: Path, api: type[Api]) -> None:
    def wrong(_self: Any, _name: str) -> None:
        raise TypeError("ours")

    api.model_info = wrong  # type: ignore[assignment]
    with pytest.raises(TypeError, match="ours"):
        pushed(final)


def test_without_a_network_or_a_token_it_is_said(final: Path, api: type[Api]) -> None:
    def lost(*_words: Any, **_more: Any) -> None:
        raise OSError("Name or service not known")

    api.create_repo = lost  # type: ignore[assignment]
    refused(lambda: pushed(final), NAME, "cannot be reached")


def test_a_public_repository_is_no_private_one(final: Path, api: type[Api]) -> None:
    api.is_public = True
    refused(lambda: pushed(final), NAME, "must be private")
    assert not list((api.root / NAME / COMMIT).iterdir())


def test_a_run_and_a_name_that_is_none_are_refused(home: Path, capsys: Any) -> None:
    for words, said in (
        ([str(home / "run"), f"--to={NAME}"], f"model of this run is {home / 'run' / 'final'}"),
        ([str(home / "run" / "final"), "--to=name"], "owner/name"),
        ([str(home / "run" / "final"), NAME], "--to=OWNER/NAME"),
        ([str(home / "no"), "--to", NAME], "must be the folder of a trained model"),
        ([str(home / "run" / "final"), f"--to={NAME}", "--license=My own"], "apache-2.0"),
    ):
        with pytest.raises(SystemExit) as stop:
            push.main(words)
        assert stop.value.code == 2 and said in capsys.readouterr().err


def test_an_adapter_holds_rows_and_loads_in_peft_anywhere(
    home: Path, final: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    with safe_open(final / "adapter_model.safetensors", "pt") as tensors:
        shapes = {n: tensors.get_slice(n).get_shape() for n in tensors.keys()}  # noqa: SIM118
    config = json.loads((final / "adapter_config.json").read_text())
    num_rows = {name: len(rows) for name, rows in config["trainable_token_indices"].items()}
    assert len(num_rows) == 2  # an untied head has its own
    tables = [s for n, s in shapes.items() if "embed_tokens" in n or "lm_head" in n]
    assert sorted(tables) == sorted([n, 16] for n in num_rows.values())
    monkeypatch.chdir(tmp_path)
    plain = AutoPeftModelForCausalLM.from_pretrained(final)
    hold_to_smbfast(plain, final, home)


def test_a_merged_model_is_what_vllm_reads(home: Path, final: Path) -> None:
    """Architecture, names and shapes of its tensors, a tokenizer that loads, and token ids."""
    merged = home / "run" / "merged"
    config = AutoConfig.from_pretrained(merged)
    assert config.architectures == ["LlamaForCausalLM"] and not config.tie_word_embeddings
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config)
    expected = {n: list(p.shape) for n, p in lm.named_parameters()}
    with safe_open(merged / "model.safetensors", "pt") as tensors:
        shapes = {n: tensors.get_slice(n).get_shape() for n in tensors.keys()}  # noqa: SIM118
    assert shapes == expected
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert len(tokenizer) <= config.vocab_size == shapes["lm_head.weight"][0]
    hold_to_smbfast(AutoModelForCausalLM.from_pretrained(merged), final, home)
    card = (merged / "README.md").read_text()
    assert "prompt_token_ids" in card and "AutoPeftModel" not in card
    assert ModelCard(card).data.library_name == "transformers"
    assert all(MODEL_FILES.fullmatch(name) for name in verify_folder(merged)["files"])


def hold_to_smbfast(lm: Any, final: Path, home: Path) -> None:
    """The state at the last of `token_ids` is the embedding by the pool `last`."""
    events = table_of(split_rows("held_out"))
    model = smbfast.load(final, device="cpu")
    rows = model.tokens(events, at="last")["token_ids"].to_pylist()
    expected_KD = model.embed(events, at="last", pool="last").vector_KD
    for row, expected_D in zip(rows, expected_KD, strict=True):
        with torch.no_grad():
            states = lm(input_ids=torch.tensor([row]), output_hidden_states=True).hidden_states
        state_D = states[-1][0, -1].numpy()
        assert np.abs(state_D - expected_D).max() <= PLAIN * np.abs(expected_D).max()


def test_cards_of_people_are_carried(final: Path) -> None:
    card = card_of(final, PROBE).replace("## Limits", "## Ours\n\nOur words.\n\n## Limits")
    merged = merged_card(card, Path("merged"))
    assert "Our words." in merged and ModelCard(merged).data.eval_results
    text, is_licensed = shared_card(card, final, NAME, {}, "other")
    assert "Our words." in text and is_licensed
    refused(lambda: shared_card("---\na: [\n---\n", final, NAME, {}, None), "metadata of the Hub")


def test_no_other_file_of_a_run_is_on_the_list() -> None:
    for name in ("metrics.jsonl", "probe.json", "sample.json", "online.parquet", "report.html"):
        assert not MODEL_FILES.fullmatch(name)


@pytest.mark.parametrize("line", ["It lies in /disk/hospital/x.", "Of `C:\\data\\x`", "(/a/b)"])
def test_a_card_that_names_a_path_stays_here(final: Path, tmp_path: Path, line: str) -> None:
    copy = copied(final, tmp_path / "final")
    settings = push_arguments([str(copy), f"--to={NAME}"])
    card = copy / "README.md"
    before = card.read_text()
    card.write_text(f"{before}\n{line}\n")
    refused(lambda: shipment_of(settings), "no path of this machine")
    card.write_text(f"{before}\nSee https://huggingface.co/org/x and his/her notes, 1/2/2020.\n")
    assert shipment_of(settings).files["README.md"]


@pytest.mark.parametrize("name", ["README.md", "LICENSE"])
def test_a_link_beside_a_model_is_not_followed(final: Path, tmp_path: Path, name: str) -> None:
    copy = copied(final, tmp_path / "final")
    (tmp_path / "notes").write_text("words of somebody")
    (copy / name).unlink(missing_ok=True)
    (copy / name).symlink_to(tmp_path / "notes")
    settings = push_arguments([str(copy), f"--to={NAME}"])
    refused(lambda: shipment_of(settings), name, "it is a link to another place")
