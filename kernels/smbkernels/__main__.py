"""python -m smbkernels: which implementation of each operation can run here."""

import argparse

import torch
import triton

from smbkernels.registry import load, table


def main(argv: list[str] | None = None) -> None:
    """Print operations × backends, why one cannot run, and what a call without a choice takes."""
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(
        prog="python -m smbkernels",
        description="Operations and their implementations: ok, or the reason why not.",
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default=here, help="default here: %(default)s"
    )
    device = parser.parse_args(argv).device
    lines = load(device)
    reasons: list[str] = []
    print(f"smbkernels on {device}; torch {torch.__version__}, triton {triton.__version__}\n")
    rows = [
        [_cell(cell, reasons) if i else cell for cell in row] for i, row in enumerate(table(device))
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip())
    for number, reason in enumerate(reasons, 1):
        print(f"{'' if number > 1 else chr(10)}[{number}] {reason}")
    print("\nA call without an explicit choice takes the first that fits its arguments:")
    print("\n".join(f"  {line}" for line in lines))


def _cell(text: str, reasons: list[str]) -> str:
    if text in ("ok", "-") or " " not in text:
        return text
    if text not in reasons:
        reasons.append(text)
    return f"no [{reasons.index(text) + 1}]"


if __name__ == "__main__":
    main()
