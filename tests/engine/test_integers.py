"""Fields of integers in one buffer."""

import torch

from taut.engine.integers import fields, room


def test_fields_are_aligned_apart_and_whole():
    for sizes in ([2, 6, 0, 1, 5, 4, 3], [14, 14, 2, 7, 8, 1, 1, 9], [0, 0, 0], [4]):
        buffer = torch.zeros(room(sizes), dtype=torch.int32)
        found = fields(buffer, sizes, 3)
        dtypes = [torch.int64] * 3 + [torch.int32] * len(sizes)
        assert [field.dtype for field in found] == dtypes[: len(sizes)]
        for number, field in enumerate(found, 1):
            assert (field.data_ptr() - buffer.data_ptr()) % 16 == 0 or not field.numel()
            field.fill_(number)
        assert [field.nbytes for field in found] == [4 * size for size in sizes]
        for number, field in enumerate(found, 1):
            assert (field == number).all()
