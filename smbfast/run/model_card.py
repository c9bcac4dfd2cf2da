"""The card of a model, README.md in its folder: what it is, made of what, and how to load it.

It is filled from the run, makes no claim, and is for people to edit: it lies outside the manifest.
Counts are rounded to two digits, and none below a hundred is in it.
"""

from pathlib import Path

from jinja2 import Environment, StrictUndefined

import smbfast

_TEMPLATE = """\
---
library_name: {{ library }}
{% if hub_name -%}
base_model: {{ hub_name }}
{% endif -%}
tags:
- smbfast
- ehr
- meds
---

# {{ title }}

{{ what }} It reads longitudinal health records in MEDS and gives one embedding of a patient at a
moment, from the events up to it. Trained by smbfast {{ version }}, step {{ step }}.

| | |
| --- | --- |
| backbone | {{ backbone }} |
{% if weights_digest -%}
| digest of the backbone | `{{ weights_digest[:16] }}` |
{% endif -%}
| weights | {{ trains }}, {{ dtype }} |
| format of the records | {{ data_format }}, version {{ format }} |
| context length | {{ window }} tokens |
| embedding | {{ pool }} |
| EMA teacher | {{ target }} |

## Data

| | |
| --- | --- |
| fingerprint | `{{ data_digest }}` |
{% for name, count in counts -%}
| {{ name }} | {{ count }} |
{% endfor %}
Counts are of the split `train`, rounded. Which patients they are, and who is missing among them, is
for those to add who know the data.

## How to use

```python
import smbfast

model = smbfast.load("{{ folder }}"{{ moved }})
result = model.embed("MEDS_FOLDER", at="last")  # .vector_KD, .table, .counts
tokens = model.tokens("MEDS_FOLDER", at="last")  # for transformers or vLLM
```

```
python -m smbfast.embed --model={{ folder }} --data=MEDS_FOLDER --at=last --out=now.parquet
```

{{ plain }}

## Training

{% if losses -%}
| phase | step of the lowest tuning loss | loss |
| --- | --- | --- |
{% for name, step, loss in losses -%}
| {{ name }} | {{ step }} | {{ loss }} |
{% endfor %}
{% else -%}
No tuning loss was recorded.

{% endif -%}
Results of probes, where the run had tasks, are in `probe.json` and `report.html` of its folder.

## Limits

- It was made for research. It has not been validated for the care of patients, and embeddings are
  no diagnosis.
- It holds what its data held, also what is wrong or unequal in them. On records of other hospitals,
  coding systems or years it may be of less use, which nobody has measured.
- Weights may hold traces of the records that they were trained on. Who may have the data may have
  the model, unless somebody has decided otherwise.
"""
_LORA = """With PEFT alone, in any working directory:

```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```

Where the backbone has moved, smbfast takes its folder as `--model.path`, and PEFT as
`base_model_name_or_path` in `adapter_config.json`."""
_WHOLE = """With transformers alone:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```"""
_POOLS = {
    "last": "state of the last token",
    "mean": "mean of all tokens",
    "layers": "means of all tokens after every layer, side by side",
    "spread": "state of the last token beside mean, maximum and deviation of all tokens",
}
_COUNTED = ("subjects", "events", "tokens")


def model_card(record: dict, folder: Path, prepared: dict, best: dict, *, target: bool) -> str:
    """Return the card of a model as Markdown.

    Args:
        record: what `smbfast.json` holds.
        folder: of the model.
        prepared: the record of the token shards that it was trained on (prepare.json).
        best: step and loss of each phase's best evaluation.
        target: whether the EMA teacher is stored beside it.
    """
    lora, backbone = record["trains"] == "lora", record["backbone"]
    local = backbone is not None and Path(backbone).is_absolute()
    name = Path(backbone).name if local else backbone or "made from scratch"
    what = f"A LoRA adapter of {name}." if lora else f"A causal language model ({name})."
    counts = prepared["counts"].get("train", {})
    template = Environment(undefined=StrictUndefined, autoescape=False).from_string(_TEMPLATE)
    return template.render(
        library="peft" if lora else "transformers",
        hub_name=None if local else backbone,
        title=f"Patient model {folder.resolve().parent.name}/{folder.name}",
        what=what,
        version=smbfast.__version__,
        step=record["step"],
        backbone=name,
        weights_digest=record.get("weights_digest"),
        trains="adapter" if lora else "all trained",
        dtype=record["dtype"],
        data_format=record["data_format"],
        format=record["format"],
        window=record["window"],
        pool=_POOLS[record["pool"]],
        target="stored beside it" if target else "none",
        data_digest=prepared["data"],
        counts=[(n, about(int(counts[n]))) for n in _COUNTED if n in counts],
        folder=folder.name,
        moved=', path="BACKBONE_FOLDER"' if lora and local else "",
        plain=(_LORA if lora else _WHOLE).format(folder=folder.name),
        losses=[(n, b["step"], f"{b['loss']:.4g}") for n, b in best.items()],
    )


def about(count: int) -> str:
    """Return a count rounded to two digits, so that nobody is seen to enter or leave it."""
    if count < 100:
        return "fewer than 100"
    unit = 10 ** (len(str(count)) - 2)
    return f"about {(count + unit // 2) // unit * unit:,}"
