"""Where faults strike is there: a renamed function fails here, not in an hour."""

import lives
import pytest


@pytest.mark.parametrize("place", lives.PLACES)
def test_every_place_is_a_function(place):
    owner, name = lives.find(place)
    assert callable(getattr(owner, name))
