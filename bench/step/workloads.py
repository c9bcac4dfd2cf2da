"""What a step is measured on: models of random-normal weights, and patients made of random tokens.

Windows have headers, buckets, tags and lines, so that cuts and masks are drawn by the loader as in
training, by the seed of the workload: every variant reads the same trunks, cuts and masks. On a CPU
models and windows are smaller than on a GPU; `Workload.scaled` says from what.

Windows of text are whole buckets of equal length. Those of the format `codes` are moments, each a
gap token and then events of one token: any length, and a cut after any of them.

Legend: W windows, T tokens.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, Qwen3Config

from smbfast.batch import PackedBatch, Timeline, pack_segments
from smbfast.data.loader import make_batch
from smbfast.data.sections import SECTIONS
from smbfast.model.backbone import PatientEncoder, lora_config
from smbfast.settings import LoraSettings, ObjectiveSettings

BUCKET = 16  # tokens: a tag, two lines of seven tokens, a tag; a header is as long
LINE = (BUCKET - 2) // 2
SPECIAL = 3  # ids below are not drawn
CODES_HEADER = 6  # tokens: begin, four of demographics, age
CODES_FIXED = 150  # ids of the fixed alphabet of `codes`: structure, gaps, ages; codes come behind
CODES_GAPS = 30  # of it, those that may be gaps
MOST_EVENTS = 6  # of a moment
DAY = 86_400_000_000  # microseconds
# of padded batches of 8 windows of log-normal lengths (sigma 0.8, cap 4 medians): the mean of
# 100,000 drawn; a workload takes a draw that is as full, neither a lucky nor an unlucky one
TYPICAL_FILL = 0.455
PADDED_SEQUENCES = 8


@dataclass(frozen=True)
class Size:
    """A Qwen3."""

    name: str
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocabulary: int
    tied: bool = False
    whole: bool = False  # made from scratch, all weights trained
    rows: int = 0  # the last of the vocabulary, token rows that are trained beside LoRA

    def encoder(self, device: str) -> PatientEncoder:
        """LoRA (r 16, seven linears), not zero, on a frozen base: bf16 on a GPU, fp32 on a CPU.

        One that is trained whole has no LoRA, and is fp32 everywhere.
        """
        torch.manual_seed(0)
        config = Qwen3Config(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            intermediate_size=self.ffn,
            max_position_embeddings=1 << 16,
            tie_word_embeddings=self.tied,
        )
        half = device == "cuda" and not self.whole
        dtype = torch.bfloat16 if half else torch.float32
        with torch.device(device):
            lm = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
            if not self.whole:
                rows = list(range(self.vocabulary - self.rows, self.vocabulary))
                lm = get_peft_model(lm, lora_config(lm, LoraSettings(r=16, alpha=32), rows))
            encoder = PatientEncoder(lm, 2)
        with torch.no_grad():
            for layer in encoder.lora_layers().values():
                layer.lora_B["default"].weight.normal_(std=0.02)
        return encoder


QWEN3_8B = Size("Qwen3-8B", 4096, 36, 32, 8, 128, 12288, 151936)
QWEN3_1B7 = Size("Qwen3-1.7B", 2048, 28, 16, 8, 128, 6144, 151936, tied=True)
QWEN3_0B6 = Size("Qwen3-0.6B", 1024, 28, 16, 8, 128, 3072, 151936, tied=True)
WIDTH_512 = Size("width 512", 512, 6, 8, 4, 64, 1536, 8192)
WIDTH_256 = Size("width 256", 256, 6, 4, 2, 64, 768, 8192)
# that of the default preset
SCRATCH = Size("width 96, all trained", 96, 3, 2, 1, 48, 256, 3000, tied=True, whole=True)
NEW_ROWS = 2000
QWEN3_8B_ROWS = replace(
    QWEN3_8B, name="Qwen3-8B, 2,000 rows", vocabulary=151936 + NEW_ROWS, rows=NEW_ROWS
)
WIDTH_512_ROWS = replace(
    WIDTH_512, name="width 512, 2,000 rows", vocabulary=8192 + NEW_ROWS, rows=NEW_ROWS
)
TINY = Size("width 32", 32, 2, 2, 1, 16, 64, 64)
TINY_SCRATCH = replace(
    TINY, name="width 32, all trained", vocabulary=CODES_FIXED + 50, tied=True, whole=True
)
TINY_ROWS = replace(TINY, name="width 32, 200 rows", vocabulary=64 + 200, rows=200)


@dataclass(frozen=True)
class Workload:
    """Windows, their cuts, and how many make a micro-batch."""

    name: str
    size: Size
    lengths: tuple[int, ...]  # tokens of each window; in text multiples of BUCKET
    context: tuple[float, float]  # share of a window before a cut
    micro: int  # windows of a micro-batch
    cuts: int = 1
    horizon: int | None = None
    nodes: int = 0  # decision nodes to embed in each window, instead of a training step
    codes: bool = False  # windows of the format `codes`, not text
    scaled: str = ""  # from what, on a CPU

    @property
    def num_tokens(self) -> int:
        """Of all windows: what throughput counts."""
        return sum(self.lengths)

    @property
    def description(self) -> str:
        """The workload in words."""
        lengths = self.lengths
        alike = min(lengths) == max(lengths)
        shape = str(max(lengths)) if alike else f"{min(lengths)} to {max(lengths)}"
        low, high = self.context
        parts = [f"{len(lengths)} x {shape} tokens"]
        if self.nodes:
            parts.append(f"{self.nodes} decision nodes a window")
        else:
            parts.append(f"c = {low:g}" if low == high else f"c in [{low:g}, {high:g}]")
        parts += [f"K = {self.cuts}, horizon {self.horizon}"] if self.cuts > 1 else []
        parts += ["codes"] if self.codes else []
        parts.append(self.size.name)
        return ", ".join(parts) + (f" (scaled from {self.scaled})" if self.scaled else "")

    def windows(self) -> list[Timeline]:
        """Patients of random tokens."""
        size, lengths = self.size, enumerate(self.lengths)
        if self.codes:
            first = size.vocabulary - size.rows if size.rows else SPECIAL
            return [moments(i, n, first, size.vocabulary) for i, n in lengths]
        return [window(i, n, size.vocabulary) for i, n in lengths]

    def batches(self) -> list[PackedBatch]:
        """The micro-batches of a step, with all labels and half of each future masked."""
        objective = ObjectiveSettings(context=self.context, cuts=self.cuts, horizon=self.horizon)
        windows = self.windows()
        groups = [windows[i : i + self.micro] for i in range(0, len(windows), self.micro)]
        return [make_batch(g, objective, 0, 0, jepa=True) for g in groups]

    def slice(self, longest: int, *, micro: int) -> "Workload":
        """Its shortest windows, cut to `longest` tokens: to compare with the reference.

        There are two of them, or as many as have together twice as many tokens.
        """
        cut = [min(n, longest) for n in sorted(self.lengths)]
        num_windows = max(2, int((np.cumsum(cut) <= 2 * longest).sum()))
        lengths = tuple(cut[:num_windows])
        horizon = self.horizon and min(self.horizon, longest // 8)
        changed = {"lengths": lengths, "horizon": horizon, "micro": micro}
        return Workload(**{**self.__dict__, **changed})


def window(subject: int, length: int, vocabulary: int) -> Timeline:
    """A header and full buckets, each of a tag, two lines and a tag."""
    ids_T = np.random.default_rng(subject).integers(SPECIAL, vocabulary, length, dtype=np.int32)
    start = np.arange(BUCKET, length, BUCKET, dtype=np.int32)
    ids_T[start], ids_T[start + BUCKET - 1] = 1, 2
    line = np.sort(np.concatenate([start + 1, start + 1 + LINE]))
    time = np.arange(len(start), dtype=np.int64) * DAY
    return Timeline(
        subject=subject,
        ids_T=ids_T,
        header=BUCKET,
        bucket_end_B=start + BUCKET,
        bucket_time_B=time,
        bucket_head_B=np.zeros(len(time), np.uint16),
        line_start_L=line,
        line_end_L=line + LINE,
        line_time_L=np.repeat(time, 2),
        line_section_L=np.full(len(line), SECTIONS.index("measurements"), np.uint8),
    )


def moments(subject: int, length: int, first: int, vocabulary: int) -> Timeline:
    """A window of the format `codes`, full to its last token.

    A header; then moments of 1 to 6 events, each event a line of one token. Every moment but the
    first begins with a gap token, which is no line. Age tokens within a window, at most one in a
    year, are left out.

    Args:
        first: the lowest id of the format, whose fixed alphabet comes before its codes.
        vocabulary: the id after the highest.
    """
    random = np.random.default_rng(subject)
    ids_T = random.integers(first + CODES_FIXED, vocabulary, length, dtype=np.int32)
    ids_T[:CODES_HEADER] = first + np.arange(CODES_HEADER)
    at = CODES_HEADER
    ends: list[int] = []
    gaps: list[int] = []
    while at < length:
        if ends:
            gaps.append(at)
        # a gap is never the last token
        at = min(at + bool(ends) + int(random.integers(1, MOST_EVENTS + 1)), length)
        ends.append(at if length - at > 1 else length)
        at = ends[-1]
    ids_T[gaps] = first + CODES_HEADER + random.integers(0, CODES_GAPS, len(gaps))
    line = np.setdiff1d(np.arange(CODES_HEADER, length), gaps).astype(np.int32)
    end = np.array(ends, np.int32)
    time = np.cumsum(random.integers(1, 90, len(ends))) * DAY
    return Timeline(
        subject=subject,
        ids_T=ids_T,
        header=CODES_HEADER,
        bucket_end_B=end,
        bucket_time_B=time,
        bucket_head_B=np.zeros(len(end), np.uint16),
        line_start_L=line,
        line_end_L=line + 1,
        line_time_L=time[np.searchsorted(end, line, side="right")],
        line_section_L=np.full(len(line), SECTIONS.index("measurements"), np.uint8),
    )


def node_batches(workload: Workload, *, shared: bool) -> list[tuple[PackedBatch, torch.Tensor]]:
    """For each micro-batch its packed tokens, and where the last token of each node is [nodes].

    The k-th of n nodes lies in the middle of the bucket that ends at k/n of its window: the
    buckets before it are complete, its first half is the node's tail.

    Args:
        shared: the complete buckets once as a trunk, the tails as branches; otherwise a trunk of
            its own for each node.
    """
    packs = []
    windows = workload.windows()
    for i in range(0, len(windows), workload.micro):
        trunks, branches = [], []
        for w in windows[i : i + workload.micro]:
            step = len(w) // workload.nodes
            ends = [max(k * step // BUCKET - 1, 1) * BUCKET for k in range(1, workload.nodes + 1)]
            tails = [(end, w.ids_T[end : end + BUCKET // 2]) for end in ends]
            if shared:
                trunks.append(w.ids_T[: ends[-1]])
                branches.append(tails)
            else:
                trunks += [np.concatenate([w.ids_T[:end], tail]) for end, tail in tails]
                branches += [[] for _ in tails]
        batch = pack_segments(trunks, branches)
        last = [s + n - 1 for s, n, _, prefix in batch.segment_tuples if bool(prefix) == shared]
        packs.append((batch, torch.tensor(last)))
    return packs


def padded_fill(lengths: tuple[int, ...]) -> float:
    """Real tokens over those of batches of 8 windows, padded to their longest."""
    starts = range(0, len(lengths), PADDED_SEQUENCES)
    batches = [lengths[i : i + PADDED_SEQUENCES] for i in starts]
    return sum(lengths) / sum(len(batch) * max(batch) for batch in batches)


def log_normal(num_windows: int, median: int) -> tuple[int, ...]:
    """Lengths of sigma 0.8, at most 4 medians: of 100 draws the one as full as is typical."""
    draws = []
    for seed in range(100):
        drawn = median * np.exp(0.8 * np.random.default_rng(seed).standard_normal(num_windows))
        buckets = np.clip(drawn, 4 * BUCKET, 4 * median) / BUCKET
        draws.append(tuple((BUCKET * buckets.astype(int)).tolist()))
    return min(draws, key=lambda lengths: abs(padded_fill(lengths) - TYPICAL_FILL))


def short(num_windows: int) -> tuple[int, ...]:
    """Lengths of whole records like those of the simulator, in codes: log-normal, median 46.

    Sigma is 0.8, from 22 to 256 tokens. Of 100 draws the one whose padded batches are as full as
    the median of all.
    """
    draws = []
    for seed in range(100):
        drawn = 46 * np.exp(0.8 * np.random.default_rng(seed).standard_normal(num_windows))
        draws.append(tuple(np.clip(drawn, 22, 256).astype(int).tolist()))
    return sorted(draws, key=padded_fill)[50]


def in_codes(size: Size, rows: Size, *, num_windows: int, longest: int) -> list[Workload]:
    """Many short records for a model made from scratch, and full windows for LoRA.

    Args:
        rows: a backbone with new token rows, one for each code.
        num_windows: full ones of `longest` tokens, 8 in a micro-batch.
    """
    context = ObjectiveSettings().context
    return [
        Workload("C1", size, short(32), context, 32, codes=True),
        Workload("C1-8", size, short(8), context, 8, codes=True),
        Workload("C2", rows, (longest,) * num_windows, context, min(num_windows, 8), codes=True),
    ]


def on_cuda() -> list[Workload]:
    """At full size. About 8k tokens of trunks in a micro-batch, so that rivals fit in memory."""
    mixed = log_normal(12, 2048)
    eight = (4096,) * 8
    return [
        Workload("W1", QWEN3_8B, eight, (0.5, 0.5), 2),
        Workload("W2", QWEN3_8B, eight, (0.75, 0.75), 2),
        Workload("W3", QWEN3_8B, mixed, (0.3, 0.9), 3),
        Workload("W4", QWEN3_8B, (32768,), (0.75, 0.75), 1),
        Workload("W5", QWEN3_8B, (512,) * 64, (0.5, 0.5), 16),
        Workload("W6", QWEN3_1B7, mixed, (0.3, 0.9), 3),
        Workload("W6-0.6B", QWEN3_0B6, mixed, (0.3, 0.9), 3),
        Workload("K8", QWEN3_8B, eight, (0.3, 0.875), 1, cuts=8, horizon=512),
        Workload("E8", QWEN3_8B, eight, (0.5, 0.5), 4, nodes=8),
        *in_codes(SCRATCH, QWEN3_8B_ROWS, num_windows=64, longest=512),
    ]


def on_cpu(*, quick: bool) -> list[Workload]:
    """The same at reduced width and length; with `quick` as small as it can be."""
    large, small, n = (TINY, TINY, 128) if quick else (WIDTH_512, WIDTH_256, 1024)
    num_windows = 2 if quick else 4
    alike = (n,) * num_windows
    mixed = log_normal(PADDED_SEQUENCES, n // 2)
    full, small_full = "8 x 4096, Qwen3-8B", "Qwen3-1.7B and 0.6B"
    return [
        Workload("W1", large, alike, (0.5, 0.5), num_windows, scaled=full),
        Workload("W2", large, alike, (0.75, 0.75), num_windows, scaled=full),
        Workload("W3", large, mixed, (0.3, 0.9), 8, scaled="median 2048 in 32k, Qwen3-8B"),
        Workload("W4", large, (4 * n,), (0.75, 0.75), 1, scaled="1 x 32768, Qwen3-8B"),
        Workload("W5", large, (max(n // 8, 64),) * 32, (0.5, 0.5), 32, scaled="64 x 512, Qwen3-8B"),
        Workload("W6", small, mixed, (0.3, 0.9), 8, scaled=f"W3's lengths, {small_full}"),
        Workload(
            "K8", large, alike, (0.3, 0.875), num_windows, cuts=8, horizon=n // 8, scaled=full
        ),
        Workload("W1-256", small, alike, (0.5, 0.5), num_windows),
        Workload("W2-256", small, alike, (0.75, 0.75), num_windows),
        Workload("E8", large, alike, (0.5, 0.5), num_windows, nodes=8, scaled=full),
        *in_codes(
            TINY_SCRATCH if quick else SCRATCH,
            TINY_ROWS if quick else WIDTH_512_ROWS,
            num_windows=num_windows if quick else 8,
            longest=n if quick else 512,
        ),
    ]


def workloads(device: str, *, quick: bool) -> dict[str, Workload]:
    """All of a kind of device, by name."""
    known = on_cuda() if device == "cuda" else on_cpu(quick=quick)
    return {w.name: w for w in known}
