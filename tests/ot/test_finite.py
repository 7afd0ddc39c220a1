"""Which rows hold finite numbers alone; the reference is `torch.isfinite` on every entry."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from openclip_otco.ot.finite import finite_rows

numbers = st.sampled_from([0.0, 1.0, -2.5, 65504.0, -65504.0, float("inf"), float("-inf"), float("nan")])


@given(
    st.integers(1, 5).flatmap(lambda width: st.lists(st.lists(numbers, min_size=width, max_size=width), min_size=1)),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_a_row_is_finite_if_all_its_entries_are(rows, dtype):
    features = torch.tensor(rows, dtype=dtype)
    assert torch.equal(finite_rows(features), torch.isfinite(features).all(dim=1))


def test_no_rows():
    assert finite_rows(torch.zeros(0, 3)).shape == (0,)
