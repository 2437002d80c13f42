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
    fits = [tables.fit(tables.histogram(one)) for one in streams()]
    many = tables.fit_all(np.array(list(map(tables.histogram, streams()))))
    assert rest.estimates(SIZES, many).tolist() == [
        rest.estimate(int(size), fit) for size, fit in zip(SIZES, fits, strict=True)
    ]
    assert rest.paying(SIZES, many).tolist() == [
        fit is not None and rest.pays(int(size), fit) for size, fit in zip(SIZES, fits, strict=True)
    ]
    assert rans.lanes_of_all(SIZES).tolist() == [rans.lanes(int(size)) for size in SIZES]


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
    fits = tables.fit_all(np.array(list(map(tables.histogram, own))))
    head, length = rest.heads(sizes, fits, words)
    for stream, part in zip(packed, np.split(head, np.cumsum(length)[:-1]), strict=True):
        assert stream.startswith(part.tobytes())


def test_frames_of_many_probes() -> None:
    heads = [one[: rest.PROBE] for one in streams()] * 5
    assert rest.searched_bytes(heads) == [len(rest._searched(head)) for head in heads]
