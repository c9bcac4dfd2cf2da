"""A script for a GPU, which tests/test_fake_gpu.py rehearses without one.

python -m tests.gpu_script [mixed|large]
"""

import json
import sys

import torch


def main() -> None:
    x_TD = torch.randn(64, 32, device="cuda", requires_grad=True)
    (x_TD.square().sum() * torch.tensor(2.0, device="cuda")).backward()
    if "mixed" in sys.argv:
        x_TD + torch.ones(64, 32)
    if "large" in sys.argv:
        torch.empty(1 << 40, device="cuda")
    index_T = torch.arange(8, device="cuda")
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    end.record()
    torch.cuda.set_sync_debug_mode("error")
    try:
        x_TD.sum().item()
    except RuntimeError as error:
        waits = str(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    read = {
        "name": torch.cuda.get_device_name(),
        "grad": x_TD.grad.device.type,
        "even": (index_T % 2 == 0).nonzero()[:, 0].tolist(),
        "host": (torch.arange(3) + 1).tolist(),
        "loss": x_TD.sum().item(),
        "copied": x_TD.detach().cpu().numpy().shape,
        "ms": begin.elapsed_time(end),
        "waits": waits,
        "pinned": torch.ones(3).pin_memory().is_pinned(),
        "allocated": torch.cuda.memory_allocated(),
    }
    print(json.dumps(read))


if __name__ == "__main__":
    main()
