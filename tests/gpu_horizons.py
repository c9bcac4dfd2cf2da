"""Steps with horizon JEPA and codes to come, which tests/test_fake_gpu.py rehearses without a GPU.

python -m tests.gpu_horizons
"""

import json
from functools import partial

import numpy as np

from bench.fakegpu.ledger import Ledger
from smbfast import objective
from smbfast.data.horizons import Horizons
from smbfast.data.loader import make_batch
from smbfast.model.backbone import PatientEncoder
from smbfast.model.codes_head import CodesHead
from smbfast.model.target import TargetEncoder
from smbfast.run.optim import make_optimizer
from smbfast.run.step import LossScales, Updater, forward_backward
from smbfast.settings import ObjectiveSettings, OptimSettings
from tests.horizon_records import CLASSES, RECORDS, shown
from tests.tiny import tiny_lm


def main() -> None:
    horizons, form = Horizons(("3d", "30d"), 0, "drop"), ObjectiveSettings(jepa="horizon")
    windows = [window for window, _ in shown(RECORDS.values(), horizons)]
    wanted = {"jepa": True, "codes": True, "horizons": horizons}
    batches = [make_batch(windows[k::2], form, 0, 0, **wanted).pinned() for k in range(2)]
    lm = tiny_lm("qwen3", hidden_size=128, head_dim=64, max_position_embeddings=64)
    head = CodesHead(128, np.full((2, CLASSES), 0.1), weighted=True)
    encoder = PatientEncoder(lm, 2, num_horizons=2, codes=head).to("cuda")
    target = TargetEncoder(encoder)
    updater = Updater(make_optimizer(encoder, OptimSettings()), clip=1.0)
    losses, scales = partial(objective.losses, normalize=True), LossScales(0.1, 0.1, 0.1)
    for _ in range(2):  # of the first, the targets are averaged once before it
        with Ledger() as ledger, ledger.part("step"):
            forward_backward(losses, encoder, target, batches, scales)
            updater.step(1e-3, target, 0.9)
    kernels = sum(row.kernels for row in ledger.rows.values())
    read = {"waits": list(ledger.waits), "copies": list(ledger.copies), "kernels": kernels}
    print(json.dumps(read))


if __name__ == "__main__":
    main()
