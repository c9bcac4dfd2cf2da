"""The words of the card of a model: templates of jinja2, which `smbfast.run.model_card` fills."""

BODY = """\
# {{ title }}

{{ what }} It reads longitudinal health records in MEDS and gives one
embedding of a patient at a moment, from the events up to it. Trained by smbfast {{ version }},
step {{ step }}.

| | |
| --- | --- |
{% for name, value in rows if value != "none" %}
| {{ name }} | {{ value }} |
{% endfor %}

## Intended use

Research with records like those that it was trained on: embeddings of patients as features of a
model that is fitted and judged on one's own labels, comparisons of methods, and further training.

## Out of scope

- Decisions about the care, the insurance or the employment of any person.
- Finding out who somebody is, or whether somebody's record was in the training data.
- Records of other hospitals, coding systems or years, before it was judged on them.
- Text for people to read: what it writes next is no forecast that anybody has checked.

## Data

| | |
| --- | --- |
| fingerprint | `{{ data_digest }}` |
{% for name, count in counts %}
| {{ name }} | {{ count }} |
{% endfor %}

Counts are of the split `train`, rounded. Which patients they are, and who is missing among them, is
for those to add who know the data.

## Results

{% if figures %}
Figures are of {{ judged_on.replace("_", "-") }} patients, by a linear read-out of embeddings,
with 95 % intervals over patients. The best baseline is that by the first metric of a task.
{% if judged_on == "tuning" %}
Read-out, penalty and calibration were chosen on these patients, so new ones will be predicted
somewhat worse. Held-out patients have not been looked at for these figures.
{% else %}
Held-out patients were looked at {{ num_looks }} {{ "time" if num_looks == 1 else "times" }} in this
run.
{% endif %}

| task | metric | this model | best baseline | patients |
| --- | --- | --- | --- | --- |
{% for figure in figures %}
| {{ figure.task }} | {{ figure.metric }} | {{ figure.text }} | {{ figure.rival }} \
| {{ figure.patients }} |
{% endfor %}

{% for verdict in verdicts %}
- {{ verdict }}
{% endfor %}
{% else %}
The run has probed no task of which figures can be shown.
{% endif %}
{% if left_out %}

Left out, as ten {{ judged_on.replace("_", "-") }} patients or fewer have the outcome, or have it \
not: {{ left_out | join(", ") }}.
{% endif %}

## Training

| | |
| --- | --- |
{% for name, value in settings %}
| {{ name }} | {{ value }} |
{% endfor %}

{% if losses %}
| phase | step of the lowest tuning loss | loss |
| --- | --- | --- |
{% for name, step, loss in losses %}
| {{ name }} | {{ step }} | {{ loss }} |
{% endfor %}
{% else %}
No tuning loss was recorded.
{% endif %}

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

## Limits

- It was made for research. It has not been validated for the care of patients, and embeddings are
  no diagnosis.
- It holds what its data held, also what is wrong or unequal in them. On records of other hospitals,
  coding systems or years it may be of less use, which nobody has measured.
- Weights may hold traces of the records that they were trained on: what stands in a record alone
  can be drawn from a model that has seen it often. This model was not probed for that; the page "A
  model for others" of smbfast has the exposure of planted secrets, and how it is measured. Who may
  have the data may have the model, unless somebody has decided otherwise.

## Licence

Not decided. It depends on the backbone's licence and on the agreement under which the data were
used; who shares the model fills in `license` above.
"""
LORA = """\
With PEFT alone, in any working directory:

```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("{{ folder }}")
tokenizer = AutoTokenizer.from_pretrained("{{ folder }}")
```

Where the backbone has moved, smbfast takes its folder as `--model.path`, and PEFT as
`base_model_name_or_path` in `adapter_config.json`."""
WHOLE = """\
With transformers alone:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{{ folder }}")
tokenizer = AutoTokenizer.from_pretrained("{{ folder }}")
```"""
MERGED = (
    WHOLE
    + """

With vLLM, on the token ids that smbfast makes of a record. Its `LAST` without activation is the
state of the last token, `pool="last"` of smbfast:

```python
import smbfast
from vllm import LLM
from vllm.config import PoolerConfig

ids = smbfast.load("final").tokens("MEDS_FOLDER", at="last")["token_ids"].to_pylist()
pooler = PoolerConfig(pooling_type="LAST", use_activation=False)  # older versions: normalize=False
llm = LLM("{{ folder }}", runner="pooling", convert="embed", pooler_config=pooler)
answers = llm.embed([{"prompt_token_ids": row} for row in ids])
vectors = [answer.outputs.embedding for answer in answers]
```"""
)
