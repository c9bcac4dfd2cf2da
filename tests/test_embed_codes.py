"""Embeddings of timelines in codes: every moment is a prefix, so a window is its trunk alone."""

import numpy as np
import pytest
import torch

from smbfast.batch import UNKNOWN
from smbfast.data.meds import BIRTH
from smbfast.data.nodes import NodeText, SharedWindow, node_texts, shared_windows
from smbfast.probing.pooling import Row, pooled_by
from smbfast.settings import POOLS
from tests.data.code_tables import code_serializer
from tests.data.event_tables import DAY, Event, batch_of, event, nodes_of, us
from tests.data.test_prefix_law import InMemory, at
from tests.test_embed import CPU, MANY, one_each
from tests.two_paths import FP64, make_encoder, moved_target

WINDOW = 48


def patient() -> list[Event]:
    """Forty moments of one to four events, hours to months apart."""
    random, time = np.random.default_rng(0), us("2150-01-31")
    events = [event(None, "GENDER//F"), event("2100-05-02", BIRTH)]
    for _ in range(40):
        time += int(DAY * random.choice([0.001, 0.2, 3, 40]))
        for _ in range(int(random.integers(1, 5))):
            events.append(event(time, "LAB//GLU", float(random.choice([-3, 0, 101, 4.2e9]))))
        if random.random() < 0.5:
            events.append(event(time, "DIAGNOSIS//E11", None, str(random.choice(["neg", "pos"]))))
    return events


def nodes_and_windows() -> tuple[list[NodeText], list[SharedWindow], int]:
    events, serializer = patient(), code_serializer()
    batch = batch_of(events)
    (timeline,) = serializer.timelines(batch)
    assert timeline.birth != UNKNOWN and len(timeline) > 3 * WINDOW
    nodes = at(1, list(nodes_of(events)))
    texts = list(node_texts(InMemory(batch), serializer, nodes, WINDOW, {}))
    return texts, list(shared_windows(iter(texts), MANY)), len(serializer.vocabulary)


def test_a_window_of_codes_is_its_trunk_alone() -> None:
    texts, windows, _ = nodes_and_windows()
    assert len(texts) > 80 and all(len(text.ids_T) <= WINDOW for text in texts)
    assert len(windows) == len({text.start for text in texts}) > 2  # one forward a window
    for window in windows:
        assert not window.branches and set(window.branch_K) == {-1}
        assert len(window) == len(window.nodes[-1].ids_T)
    assert [node for window in windows for node in window.nodes] == texts


@pytest.mark.numeric
@pytest.mark.parametrize("which", ["online", "target"])
@torch.no_grad()
def test_nodes_of_one_forward_are_those_of_one_forward_each(which: str) -> None:
    texts, windows, num_tokens = nodes_and_windows()
    encoder = make_encoder(dtype=FP64, vocab_size=num_tokens)
    chosen = encoder if which == "online" else moved_target(encoder)
    got = pooled_by(chosen.packed, Row.of(windows), POOLS, CPU)
    ends = [len(t.ids_T) for t in texts]
    # the sums of two layers differ in their order: far below 1e-12 in fp64, as in text
    for pool, expected in one_each(chosen.hidden, texts).items():
        assert np.abs(got[pool] - expected).max() <= 1e-12 * np.abs(expected).max(), pool
        assert len(np.unique(expected.round(6), axis=0)) >= len(set(ends))
