"""What a run leaves loads in transformers and PEFT, and gives the same hidden states."""

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import smbfast.train as entry
from smbfast.data.prepared import Prepared
from smbfast.data.tokens import CLOSE, OPEN, train_tokenizer
from smbfast.run.checkpoint import restore_final
from smbfast.simulation.dataset import simulate
from tests.tiny import tiny_lm

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_report")]

CPU = torch.device("cpu")
SHORT = [
    "--probe.labels=[]",
    "--phases.0.steps=2",
    "--phases.1.steps=2",
    "--phases.0.lr=0.01",
    "--phases.1.lr=0.01",
    "--data.format=text-paper",
    "--data.window=96",
    "--run.threads=1",
]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "cohort"
    simulate(folder, 60, 0)
    return folder


@pytest.fixture(scope="module")
def scratch(cohort, tmp_path_factory):
    """A run of a model made from scratch, with a merged export."""
    folder = tmp_path_factory.mktemp("run") / "scratch"
    paths = [f"--data.path={cohort}", f"--run.dir={folder}"]
    entry.main(["tiny", *paths, "--export", "merged", *SHORT])
    return folder


@pytest.fixture(scope="module")
def adapted(cohort, scratch, tmp_path_factory):
    """A LoRA run on the final folder of the run from scratch, as README shows it."""
    folder = tmp_path_factory.mktemp("run") / "lora"
    paths = [f"--data.path={cohort}", f"--run.dir={folder}"]
    entry.main(["tiny", *paths, f"--model.path={scratch / 'final'}", "--export=merged", *SHORT])
    return folder


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def foreign(request, cohort, tmp_path_factory):
    """A LoRA run on a backbone whose tokenizer has never seen a delimiter."""
    base = tmp_path_factory.mktemp("base")
    lines = [f"word{i} value {i}.5, and [20{i:02d}-01-01]\n" for i in range(60)]
    tokenizer = train_tokenizer(lines, 400)
    vocabulary = tokenizer.get_vocab()
    plain = {t for t in (*OPEN, *CLOSE) if t in vocabulary}
    assert plain  # ours has them: rebuild one without
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    bare.train_from_iterator(lines, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, bos_token="<s>")
    tokenizer.save_pretrained(base)
    lm = tiny_lm(request.param, tie=request.param == "qwen3")
    # like Qwen3, one has rows to spare; the other has to be resized for the delimiters
    lm.resize_token_embeddings(len(tokenizer) + (40 if request.param == "llama" else 0))
    lm.save_pretrained(base)
    folder = tmp_path_factory.mktemp("run") / "foreign"
    paths = [f"--data.path={cohort}", f"--run.dir={folder}", f"--model.path={base}"]
    entry.main(["tiny", *paths, "--export=merged", "--lora.r=4", *SHORT])
    return base, folder


def hidden(lm, ids):
    """Last hidden state of a plain causal LM."""
    with torch.no_grad():
        return lm(input_ids=ids, output_hidden_states=True).hidden_states[-1]


def ids_for(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "<conditions>Type 2 diabetes\n</conditions><drugs>Iron tablet\n</drugs>"
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    assert tokenizer.convert_tokens_to_ids("</drugs>") in ids[0].tolist()
    return ids


def ids_of(folder, token):
    return AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(token)


def test_a_model_made_from_scratch_loads_in_transformers(scratch):
    encoder, target, _ = restore_final(scratch / "final", CPU)
    lm = AutoModelForCausalLM.from_pretrained(scratch / "final")
    ids = ids_for(scratch / "final")
    with torch.no_grad():
        assert torch.equal(hidden(lm, ids), encoder.hidden(ids))
        moved = target.hidden(ids) - encoder.hidden(ids)
    assert float(moved.abs().max()) > 0  # the target is another, slower model
    merged = AutoModelForCausalLM.from_pretrained(scratch / "merged")
    assert torch.equal(hidden(merged, ids), hidden(lm, ids))


def test_an_adapter_loads_in_peft(scratch, adapted):
    encoder, target, _ = restore_final(adapted / "final", CPU)
    ids = ids_for(adapted / "final")
    base = AutoModelForCausalLM.from_pretrained(scratch / "final")
    plain = hidden(base, ids)
    model = PeftModel.from_pretrained(base, adapted / "final")
    with torch.no_grad():
        ours = encoder.hidden(ids)
        torch.testing.assert_close(hidden(model, ids), ours, rtol=0, atol=1e-6)
        assert (plain - ours).abs().max() > 1e-4  # the adapter does something
        assert (target.hidden(ids) - ours).abs().max() > 1e-6
    merged = AutoModelForCausalLM.from_pretrained(adapted / "merged")
    torch.testing.assert_close(hidden(merged, ids), ours, rtol=0, atol=1e-5)


def test_two_runs_write_the_names_of_linears_in_one_order(adapted):
    """PEFT has them in a set, whose order is another in each process."""
    names = json.loads((adapted / "final" / "adapter_config.json").read_text())["target_modules"]
    assert len(names) == 7 and names == sorted(names)


def test_a_foreign_backbone_learns_its_delimiter_rows(foreign):
    base_folder, folder = foreign
    encoder, target, record = restore_final(folder / "final", CPU)
    ids = ids_for(folder / "final")
    tokens, rows = encoder.trained_rows()
    assert len(tokens) == len(OPEN) + len(CLOSE)
    (record_file,) = folder.rglob("prepare.json")
    new = {t.id: t for t in Prepared.open(record_file.parent).new_tokens}
    assert list(new) == tokens
    drugs, closed = (new[ids_of(folder / "final", t)] for t in ("<drugs>", "</drugs>"))
    assert (drugs.text, closed.text, drugs.num_bins, closed.num_bins) == ("drugs", "drugs", 2, 2)
    assert (drugs.bin, closed.bin) == (0, 1)
    held = load_file(folder / "final" / "adapter_model.safetensors")
    assert not [n for n in held if "base_layer" in n]  # rows alone, also of a table that has grown
    with torch.no_grad():
        ours, logits = encoder.hidden(ids), encoder.lm(input_ids=ids).logits
    model = AutoPeftModelForCausalLM.from_pretrained(folder / "final")
    torch.testing.assert_close(hidden(model, ids), ours, rtol=0, atol=1e-6)
    torch.testing.assert_close(model(input_ids=ids).logits, logits, rtol=0, atol=1e-5)
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    if record["vocabulary"] > base.get_input_embeddings().num_embeddings:
        base.resize_token_embeddings(record["vocabulary"], mean_resizing=False)
    model = PeftModel.from_pretrained(base, folder / "final")
    torch.testing.assert_close(hidden(model, ids), ours, rtol=0, atol=1e-6)
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged")
    torch.testing.assert_close(hidden(merged, ids), ours, rtol=0, atol=1e-5)
    gap = (target.exact()["token_rows"] - rows).abs().max()
    assert float(gap) > 0  # trained rows are averaged too


def test_training_goes_on_from_an_adapter(cohort, adapted, tmp_path):
    folder = tmp_path / "further"
    # its backbone is known
    paths = [f"--data.path={cohort}", f"--run.dir={folder}", f"--model.path={adapted / 'final'}"]
    # with JEPA in its first phase too, it evaluates the windows that the other run ended with
    more = [*SHORT, "--phases.0.w_jepa=1"]
    entry.main(["tiny", *paths, *more])
    first = (folder / "metrics.jsonl").read_text().splitlines()[1]
    last = (adapted / "metrics.jsonl").read_text().splitlines()[-2]
    import json

    # it begins with what the adapter had learned: the same loss on the same fixed positions
    assert json.loads(first)["sft"] == pytest.approx(json.loads(last)["sft"], rel=1e-5)


@pytest.mark.parametrize("form", ["merged", "tracked"])
def test_a_base_in_bf16_keeps_fp32_adapters_and_an_fp32_target(cohort, scratch, tmp_path, form):
    folder = tmp_path / "half"
    paths = [f"--data.path={cohort}", f"--run.dir={folder}", f"--model.path={scratch / 'final'}"]
    bf16 = ["--model.dtype=bfloat16", f"--objective.target_form={form}"]
    entry.main(["tiny", *paths, *bf16, "--export=merged", *SHORT])
    encoder, target, _ = restore_final(folder / "final", CPU)
    assert encoder.decoder.layers[0].self_attn.q_proj.base_layer.weight.dtype == torch.bfloat16
    trained = [p for p in encoder.parameters() if p.requires_grad]
    assert trained and all(p.dtype == torch.float32 for p in trained)
    assert target.form == form
    assert all(w.dtype == torch.float32 for w in target.exact().values())
    ids = ids_for(folder / "final")
    assert float((target.hidden(ids) - encoder.hidden(ids)).abs().max()) > 0
    assert AutoModelForCausalLM.from_pretrained(folder / "merged").dtype == torch.bfloat16


def test_export_says_how_far_it_is(cohort, scratch, tmp_path, capsys):
    folder = tmp_path / "said"
    paths = [f"--data.path={cohort}", f"--run.dir={folder}", f"--model.path={scratch / 'final'}"]
    entry.main(["tiny", *paths, "--export=merged", *SHORT])
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("exported"))
    assert float(line.rsplit(" ", 1)[1]) < 1e-4
