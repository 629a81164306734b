"""What runs that raise leave behind: nothing."""

import pytest

from tests.observe.injected import tried


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_an_exception_at_any_point_leaves_everything_as_it_was():
    found = list(tried(every=61))
    assert len(found) > 400
    assert [one for one in found if one[3]] == []
