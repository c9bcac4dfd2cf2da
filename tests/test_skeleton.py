"""A hidden skeleton: of a masked future only event tokens that are kept are read, on both paths."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from smbfast import objective, reference
from smbfast.batch import PackedBatch, Timeline
from smbfast.data.loader import make_batch
from smbfast.data.masking import cut_points
from smbfast.model.backbone import PatientEncoder
from smbfast.settings import ObjectiveSettings
from tests.two_paths import make_encoder

pytestmark = pytest.mark.numeric

CUT, LENGTH = 20, 44
# of each bucket behind the cut: for each token, whether it is (part of) a line
TEXT = ("..xxx.xx.", "..xxxx.", "..xxx.x.")  # date, tag, line, tag, line, tag
OTHER_TEXT = ("..x.x.x.x.x.x.", "..xxxxxxx.")
CODES = ("x", ".xx", ".xxxx", ".x", ".x", ".xxxxxxxx", ".x")  # a gap before all but the first
OTHER_CODES = (".xxxxxxxxxxxxx", ".xxxxxxxxx")
PAIRS = {"text": (TEXT, OTHER_TEXT), "codes": (CODES, OTHER_CODES)}


def window(layout: str, which: int) -> Timeline:
    """Three header tokens, a context that is always the same, and a future of this layout.

    In `codes` every event is a line of its own.
    """
    future = PAIRS[layout][which]
    tokens = "".join(("...", "x" * (CUT - 3), *future))
    assert len(tokens) == LENGTH
    random = np.random.default_rng(1 + which)
    ids = np.random.default_rng(0).integers(3, 50, LENGTH)
    ids[CUT:] = random.integers(3, 50, LENGTH - CUT)
    is_line = np.array([c == "x" for c in tokens])
    starts = np.flatnonzero(is_line & (~np.append(False, is_line[:-1]) | (layout == "codes")))
    stops = np.flatnonzero(is_line & (~np.append(is_line[1:], False) | (layout == "codes"))) + 1
    ends = CUT + np.cumsum([0, *map(len, future)])
    return Timeline(
        subject=1,
        ids_T=ids.astype(np.int32),
        header=3,
        bucket_end_B=ends.astype(np.int32),
        bucket_time_B=ends.astype(np.int64),
        bucket_head_B=np.ones(len(ends), np.uint16),
        line_start_L=starts.astype(np.int32),
        line_end_L=stops.astype(np.int32),
        line_time_L=starts.astype(np.int64),
        line_section_L=np.full(len(starts), 3, np.uint8),
    )


def settings_of(skeleton: str, ratio: float) -> ObjectiveSettings:
    """With the first bucket's end as the only cut that is permitted."""
    return ObjectiveSettings(skeleton=skeleton, mask_ratio=ratio, context=(0.45, 0.46))


def batch_of(own: Timeline, skeleton: str, ratio: float) -> PackedBatch:
    chosen = settings_of(skeleton, ratio)
    assert cut_points(own, chosen, 0, 0) == [CUT]
    batch = make_batch([own], chosen, 0, 0, jepa=True)
    batch.check()
    return batch


@torch.no_grad()
def states(path: str, encoder: PatientEncoder, batch: PackedBatch) -> torch.Tensor:
    """Online states of all tokens of the branch."""
    rows = torch.arange(LENGTH, 2 * LENGTH - CUT)
    if path == "shared":
        return objective._online(encoder, batch)[rows]
    return reference.online_hidden(encoder, replace(batch, masked_M=rows))


@pytest.mark.parametrize("layout", PAIRS)
@pytest.mark.parametrize("path", ["shared", "reference"])
def test_all_masked_and_hidden_two_futures_of_one_length_are_the_same(path, layout):
    """Bit for bit; with the skeleton visible they differ, and so they do where events are kept."""
    encoder = make_encoder()
    pair = [window(layout, which) for which in range(2)]
    for skeleton, ratio, same in (("hidden", 1.0, True), ("visible", 1.0, False)):
        one, other = (states(path, encoder, batch_of(w, skeleton, ratio)) for w in pair)
        assert torch.equal(one, other) == same
    one, other = (states(path, encoder, batch_of(w, "hidden", 0.5)) for w in pair)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("layout", PAIRS)
@pytest.mark.parametrize("path", ["shared", "reference"])
def test_of_a_hidden_skeleton_only_kept_events_are_read(path, layout):
    """Any other id at a token of the future: states stay, but for the events that are kept."""
    encoder, own = make_encoder(), window(layout, 0)
    before = states(path, encoder, batch_of(own, "hidden", 0.5))
    batch = batch_of(own, "hidden", 0.5)
    is_line = np.zeros(LENGTH, bool)
    for start, stop in zip(own.line_start_L, own.line_end_L, strict=True):
        is_line[start:stop] = True
    masked = (batch.masked_M - LENGTH + CUT).tolist()
    assert all(is_line[p] for p in masked)
    num_kept = 0
    for position in range(CUT, LENGTH):
        ids_T = own.ids_T.copy()
        ids_T[position] = (ids_T[position] + 7) % 49 + 1
        after = states(path, encoder, batch_of(replace(own, ids_T=ids_T), "hidden", 0.5))
        kept = bool(is_line[position]) and position not in masked
        assert torch.equal(after, before) != kept
        num_kept += kept
    assert 0 < num_kept < is_line[CUT:].sum()


def test_a_skeleton_changes_what_is_read_alone():
    """What is predicted, labels, positions and the target's tokens are the same."""
    own = window("text", 0)
    visible, hidden = (batch_of(own, skeleton, 0.5) for skeleton in ("visible", "hidden"))
    assert torch.equal(visible.replaced_R, visible.masked_M)
    assert set(visible.masked_M.tolist()) < set(hidden.replaced_R.tolist())
    for name in ("masked_M", "target_M", "target_ids_U", "label_N", "labelled_N", "position_T"):
        assert torch.equal(getattr(visible, name), getattr(hidden, name)), name
    trunk = slice(0, LENGTH)
    assert torch.equal(visible.ids_T[trunk], hidden.ids_T[trunk])
