"""A hundred and fifty damaged inputs; `scripts.soak.fuzz` tries as many as one likes."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.helpers import fuzzing
from tests.helpers.fuzzing import Bench, bench_in, empty_folder
from tests.helpers.fuzzing_text import TEXT_TARGETS

pytestmark = pytest.mark.usefixtures("little_text")


TARGETS = fuzzing.TARGETS | TEXT_TARGETS


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return bench_in(tmp_path_factory.mktemp("bench"))


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_input_ends_in_one_sentence(
    name: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    @settings(
        max_examples=10, deadline=None, derandomize=True, suppress_health_check=[*HealthCheck]
    )
    @given(st.data())
    def attempt(data: st.DataObject) -> None:
        with empty_folder() as folder:
            TARGETS[name](bench, data.draw, folder)

    attempt()
