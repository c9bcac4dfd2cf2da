"""python -m smbkernels: which implementation of each operation can run here."""

import argparse

import torch
import triton

import smbkernels
from smbkernels.registry import load, table


def main(argv: list[str] | None = None) -> None:
    """Print operations × backends, and what a call without a choice takes."""
    parser = argparse.ArgumentParser(
        prog="python -m smbkernels",
        description="Operations and their implementations: ok, or the reason why not.",
    )
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default=here, help="default: %(default)s"
    )
    device = parser.parse_args(argv).device
    lines = load(device)
    rows = table(device)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    print(f"smbkernels on {device}; torch {torch.__version__}, triton {triton.__version__}")
    for row in rows:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )
    print("\nWithout an explicit choice:")
    print("\n".join(f"  {line}" for line in lines))


if __name__ == "__main__":
    assert smbkernels.__all__
    main()
