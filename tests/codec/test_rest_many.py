"""What is decided of many streams at once is what is decided of each."""

import numpy as np
import pytest

from birkhoff.codec import rest
from birkhoff.codec.entropy import rans, tables

SIZES = np.array([2, 31, 32, 5000, 70000, 3 * rans.BLOCK + 1])


def streams() -> list[np.ndarray]:
    draw = np.random.default_rng(1)
    found = [np.clip(np.rint(draw.standard_normal(size) * 3), -9, 9).astype(np.int8).view(np.uint8) for size in SIZES]
    found[2][:] = 7  # no table
    return found


def test_estimates_and_what_pays() -> None:
    fits = tables.fit(tables.histograms(np.concatenate(streams()), SIZES))
    found = rest.estimates(SIZES, fits)
    assert found[0] == 3  # raw: a byte for the kind
    assert found[2] == 32  # one value: about what zstd takes
    for number in (3, 4, 5):
        assert found[number] == pytest.approx(len(rest.pack(streams()[number])), rel=0.01)
    assert rest.pays(SIZES, fits).tolist() == [False, False, False, True, True, True]


def test_lanes_double_with_the_size() -> None:
    sizes = np.array([1, 32767, 32768, 65535, 65536, 131071, 131072, 1 << 30])
    assert rans.lanes(sizes).tolist() == [4, 4, 8, 8, 16, 16, 32, 32]


@pytest.mark.parametrize("native", [True, False])
def test_heads(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr(rest, "native", lambda: None)
    own = [one for one in streams() if rest.pack(one)[0] == rest.ANS]
    packed = [rest.pack(one) for one in own]
    sizes = np.array(list(map(len, own)))
    words = np.concatenate(
        [rest.plan([stream], [int(size)], [0], [0]).rows[:, 1] for stream, size in zip(packed, sizes, strict=True)]
    )
    fits = tables.fit(tables.histograms(np.concatenate(own), sizes))
    head, length = rest.heads(sizes, fits, words)
    for stream, part in zip(packed, np.split(head, np.cumsum(length)[:-1]), strict=True):
        assert stream.startswith(part.tobytes())


def test_frames_of_many_probes() -> None:
    heads = [one[: rest.PROBE] for one in streams()] * 5
    assert rest.searched_bytes(heads) == [len(rest._searched(head)) for head in heads]
