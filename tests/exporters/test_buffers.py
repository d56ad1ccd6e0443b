"""Memory lent and taken back."""

import numpy as np

from kiln.exporters.buffers import Buffers

SIZE = 1 << 20


def test_what_was_given_back_is_lent_again():
    buffers = Buffers()
    first = buffers.take(SIZE)
    assert (first.dtype, first.shape) == (np.uint8, (SIZE,))
    first[:] = 1
    buffers.give_back(first.view(np.float16).reshape(4, -1))
    assert np.shares_memory(buffers.take(SIZE - 1000), first)


def test_what_is_still_out_is_not_lent():
    buffers = Buffers()
    first = buffers.take(SIZE)
    assert not np.shares_memory(buffers.take(SIZE), first)


def test_giving_back_twice_lends_once():
    buffers = Buffers()
    first = buffers.take(SIZE)
    buffers.give_back(first)
    buffers.give_back(first)
    assert not np.shares_memory(buffers.take(SIZE), buffers.take(SIZE))


def test_arrays_of_others_are_left_alone():
    buffers = Buffers()
    own = np.empty(SIZE, np.uint8)
    buffers.give_back(own)
    assert not np.shares_memory(buffers.take(SIZE), own)


def test_nothing_and_little():
    buffers = Buffers()
    for nbytes in (0, 1, 1000):
        lent = buffers.take(nbytes)
        assert lent.size == nbytes
        buffers.give_back(lent)
