"""Mistakes in what is typed: names of presets, keys and values, before any data are read."""

from tests.mistakes.case import mistakes

RUN = "train tiny --run.dir=new --data.path=meds"
PLAN = "check tiny --gpus=8 --gpu=h100"
PREPARE = "prepare --path=meds --out=shards"

_PRESETS = mistakes(
    ("train Tiny", "`Tiny`", "must be a preset", "tiny"),
    ("train tinny", "`tinny`", "must be a preset", "tiny"),
    ("train ../tiny", "`../tiny`", "must be a preset", "default"),
    ("train ''", "``", "must be a preset", "default"),
    ("train mine.toml", "mine.toml", "must be a TOML file", "No such file"),
    ("train tiny default", "argument `default`", "--key=value", "default"),
    ("train lora", "model.train=lora", "needs model.path", "backbone"),
)

_KEYS = mistakes(
    ("train tiny --data.paht=x", "`data.paht`", "did you mean `data.path`", "unknown key"),
    ("train tiny data.windw=128", "`data.windw`", "did you mean `data.window`", "unknown key"),
    ("train tiny --phases.0.stps=2", "phases.0.stps", "phases.0.steps", "unknown key"),
    ("train tiny --phases.9.steps=2", "`phases.9.steps`", "one of the 2 phases", "9"),
    ("train tiny --model.path.x=3", "`model.path.x`", "`model.path`", "unknown key"),
    ("train tiny --data=3", "`data`", "data.path", "unknown key"),
    ("train tiny --window", "`--window`", "--key=value", "window"),
    ("prepare --path=meds --ut=x", "`ut`", "did you mean `out`", "unknown key", None, 2),
    ("embed --otu=x", "`otu`", "did you mean `out`", "unknown key", None, 2),
    ("probe --embedings=x", "`embedings`", "did you mean `embeddings`", "unknown key", None, 2),
    ("compare a b --tsks=x", "`tsks`", "did you mean `tasks`", "unknown key", None, 2),
    ("compare --run=a", "compare", "unknown key", "`run`", None, 2),
    ("simulate --patient=9", "`patient`", "did you mean `patients`", "unknown key", None, 2),
    ("prepare meds shards", "`meds`", "--key=value", "argument", None, 2),
    ("embed run/final meds", "`run/final`", "--key=value", "argument", None, 2),
)

_NUMBERS = mistakes(
    (f"{RUN} --optim.batch=large", "`optim.batch`", "must be an integer", "got 'large'"),
    (f"{RUN} --optim.batch=0", "`optim.batch`", "must be at least 1", "got 0"),
    (f"{RUN} --optim.batch=4.5", "`optim.batch`", "must be an integer", "got 4.5"),
    (f"{RUN} --data.window=1k", "`data.window`", "must be an integer", "got '1k'"),
    (f"{RUN} --data.window=1,024", "`data.window`", "must be an integer", "got '1,024'"),
    (f"{RUN} --data.window=", "`data.window`", "must have a value", "got nothing"),
    (f"{RUN} --data.window=64", "data.window", "must be at least 128", "got 64"),
    (f"{RUN} --data.stride=512", "data.stride", "must be at most data.window, 128", "got 512"),
    (f"{RUN} --data.gap_floor=-1", "`data.gap_floor`", "must be 0 minutes or more", "got -1"),
    (f"{RUN} --objective.mask_ratio=50", "`objective.mask_ratio`", "at most 1", "got 50"),
    (f"{RUN} --objective.mask_ratio=50%", "`objective.mask_ratio`", "a number", "got '50%'"),
    (f"{RUN} --objective.horizon=0", "`objective.horizon`", "at least 1", "got 0"),
    (f"{RUN} --data.window=8", "`data.window`", "at least 64", "got 8"),
    (f"{RUN} --objective.mask_ratio=0", "`objective.mask_ratio`", "above 0", "got 0"),
    (f"{RUN} --objective.tau=nan", "`objective.tau`", "a finite number", "got nan"),
    (f"{RUN} --phases.0.lr=inf", "`phases.0.lr`", "a finite number", "got inf"),
    (f"{RUN} --phases.0.steps=0", "`phases.0.steps`", "at least 1", "got 0"),
    (f"{RUN} --phases.0.steps=2.5", "`phases.0.steps`", "an integer", "got 2.5"),
    (f"{RUN} --phases.0.lr=-0.1", "`phases.0.lr`", "above 0", "got -0.1"),
    (f"{RUN} --phases.0.lr=3", "`phases.0.lr`", "at most 1", "got 3"),
    (f"{RUN} --phases.0.lr=nan", "`phases.0.lr`", "a finite number", "got nan"),
    (f"{RUN} --phases.0.lr=fast", "`phases.0.lr`", "a number", "got 'fast'"),
    (f"{RUN} --run.seed=-1", "`run.seed`", "at least 0", "got -1"),
    (f"{RUN} --run.keep=0", "`run.keep`", "at least 1", "got 0"),
    (f"{RUN} --run.threads=100000", "`run.threads`", "at most 1024", "got 100000"),
    (f"{RUN} --lora.r=0", "`lora.r`", "at least 1", "got 0"),
    (f"{RUN} --optim.micro_tokens=8", "`optim.micro_tokens`", "64", "got 8"),
    (f"{PLAN} --events=lots", "`events`", "must be a number", "got 'lots'"),
    (f"{PLAN} --events=-5", "`events`", "above 0", "got -5"),
    ("check tiny --gpus=0", "`gpus`", "at least 1", "got 0"),
    (f"{PREPARE} --window=32", "`window`", "at least 64", "got 32", None, 2),
    (f"{PREPARE} --stride=2048", "data.stride", "must be at most", "got 2048"),
    (f"{PREPARE} --workers=-1", "`workers`", "at least 0", "got -1", None, 2),
    ("simulate --out=c --patients=many", "`patients`", "an integer", "got 'many'", None, 2),
    ("simulate --out=c --nodes=9", "`nodes`", "at most 8", "got 9", None, 2),
    ("experiment regimes --work=w --jobs=0", "`jobs`", "at least 1", "got 0", None, 2),
)

_CHOICES = mistakes(
    (f"{RUN} --model.dtype=fp16", "`model.dtype`", "'float32' or 'bfloat16'", "got 'fp16'"),
    (f"{RUN} --data.format=tokens", "`data.format`", "'text', 'codes'", "got 'tokens'"),
    (f"{RUN} --data.bucket=week", "`data.bucket`", "'day', 'hour'", "got 'week'"),
    (f"{RUN} --objective.mask_unit=word", "`objective.mask_unit`", "'event' or 'span'", "'word'"),
    (f"{RUN} --kernels=flash3", "`kernels`", "must be one of", "got 'flash3'"),
    (f"{RUN} --kernels=attention:sdpa", "`kernels`", "timeline_attention", "attention"),
    (f"{RUN} --resume=maybe", "`run.resume`", "'auto', 'never' or 'restart'", "got 'maybe'"),
    (f"{RUN} --profile=yes", "`run.profile`", "must be an integer", "got 'yes'"),
    (f"{RUN} --run.export=onnx", "`run.export`", "'none' or 'merged'", "got 'onnx'"),
    (f"{RUN} --probe.pool=max", "`probe.pool`", "'auto', 'last', 'mean'", "got 'max'"),
    (f"{RUN} --objective.path=fast", "`objective.path`", "'shared' or", "got 'fast'"),
    (f"{RUN} --run.device=gpu", "run.device", "must be auto, cpu", "`gpu`"),
    (f"{RUN} --run.device=cuda:7", "run.device=cuda:7", "must exist", "0 CUDA GPUs"),
    ("check tiny --gpus=8 --gpu=h800", "`gpu`", "must be one of b200", "got 'h800'"),
    (f"{PREPARE} --splits=training", "`splits.0`", "'train', 'tuning'", "'training'", None, 2),
    (f"{PREPARE} --on=spark://x", "`on`", "dask://HOST:PORT", "got 'spark://x'", None, 2),
    ("experiment regime --work=w", "`name`", "'regimes'", "got 'regime'", None, 2),
)

_TOGETHER = mistakes(
    (f"{RUN} --model.hidden=30", "model.hidden", "a multiple of twice model.heads", "got 30, 2"),
    (f"{RUN} --optim.betas=0.9", "`optim.betas`", "must have 2 values", "got 1"),
    (f"{RUN} --objective.context=0.9,0.1", "`objective.context`", "in order", "got 0.9,0.1"),
    (f"{RUN} --objective.horizons=1y", "`objective.horizons`", "6h or 30d", "got 1y"),
    (f"{RUN} --data.split=0.8,0.1", "`data.split`", "three fractions", "got 0.8,0.1"),
    (f"{RUN} --data.split=80,10,10", "`data.split`", "add up to 1", "got 80,10,10"),
    (f"{RUN} --model.adapter=x", "model.adapter", "needs model.path", "backbone"),
    (f"{RUN} --model.train=lora", "model.train=lora", "needs model.path", "backbone"),
    (f"{RUN} --phases.1.freeze=decoder --phases.1.w_sft=1", "`phases.1`", "w_sft 0", "decoder"),
    (f"{RUN} --phases.0.w_sft=0", "`phases.0`", "above 0", "w_sft"),
    (f"{RUN} --phases=", "phases", "must name at least one", "got none"),
    (f"{RUN} --lora.dropout=0.1", "`lora.dropout`", "must be 0", "0.1"),
    (f"{RUN} --objective.context=0.5", "`objective.context`", "must have 2 values", "got 1"),
    (f"{RUN} --phases=[]", "phases", "must name at least one", "got none"),
    (f"{RUN} --probe.final=true", "probe.final", "needs tasks to judge", "there are none"),
    ("check tiny --gpus=8", "events", "must be given, as --events", "has none"),
    ("check tiny --model.fsdp=true", "model.fsdp", "needs LoRA", "model.path"),
    ("tasks --data=meds", "TASKS or check", "must be given", "got neither", None, 2),
    ("prepare --path=meds", "`out`", "is required", "out", None, 2),
    (f"{PREPARE} --splits=", "`splits`", "at least 1", "got 0", None, 2),
    ("probe --data=meds", "`embeddings`", "is required", "embeddings", None, 2),
    ("simulate --out=c --patients=0", "`patients`", "at least 1", "got 0", None, 2),
    ("tasks", "`data`", "is required", "data", None, 2),
    ("embed --model=run/final", "`data`", "is required", "`out`", None, 2),
    ("compare", "method", "must be given at least one", "see --help", None, 2),
)

TYPED = (*_PRESETS, *_KEYS, *_NUMBERS, *_CHOICES, *_TOGETHER)
