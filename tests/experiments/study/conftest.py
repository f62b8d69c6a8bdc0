"""Studies whose runs are faked, in a folder of their own."""

import pytest

from experiments.study.processes import Processes
from tests.experiments.study.fake_runs import FakeRuns


@pytest.fixture
def runs(monkeypatch) -> FakeRuns:
    """Takes the place of training."""
    fake = FakeRuns()

    def run(self, arguments, log):
        return 143 if self._stopped else fake(arguments, log)

    monkeypatch.setattr(Processes, "run", run)
    return fake
