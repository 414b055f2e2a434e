"""The energy of training is measured or absent, never modelled or guessed, and a result that lacks it is as before."""

import sys
from types import SimpleNamespace

import pytest
from test_training import configuration, without_timings

from eatlib.results import RunResult
from eatlib.training import TrainingError, fit, joule_meter


class FakeMonitor:
    """A machine whose two GPUs use 3 J and 2 J in a window, one CPU 4 J, and whose memory cannot be read."""

    def __init__(self) -> None:
        self.open: set[str] = set()

    def begin_window(self, name: str) -> None:
        assert name not in self.open
        self.open.add(name)

    def end_window(self, name: str) -> SimpleNamespace:
        self.open.remove(name)
        return SimpleNamespace(gpu_energy={0: 3.0, 1: 2.0}, cpu_energy={0: 4.0}, dram_energy=None)


class BlindMonitor(FakeMonitor):
    """A machine where zeus can read nothing, as a virtual one without GPU."""

    def end_window(self, name: str) -> SimpleNamespace:
        super().end_window(name)
        return SimpleNamespace(gpu_energy={}, cpu_energy=None, dram_energy=None)


def use(monkeypatch: pytest.MonkeyPatch, monitor: type | None) -> None:
    """Have zeus with this monitor, or none."""
    monkeypatch.setitem(sys.modules, "zeus", monitor and SimpleNamespace())
    monkeypatch.setitem(sys.modules, "zeus.monitor", monitor and SimpleNamespace(ZeusMonitor=monitor))


def test_each_epoch_has_the_joules_of_what_could_be_measured(monkeypatch, tmp_path):
    use(monkeypatch, FakeMonitor)
    result = fit(configuration(epochs=2))
    assert [epoch.joules for epoch in result.history] == [{"gpu": 5.0, "cpu": 4.0}] * 2
    result.save(tmp_path / "run.json")
    assert RunResult.load(tmp_path / "run.json") == result
    assert list(result.history_table()["joules"]) == [{"gpu": 5.0, "cpu": 4.0}] * 2


def test_a_resumed_run_keeps_those_of_the_epochs_before(monkeypatch, tmp_path):
    use(monkeypatch, FakeMonitor)

    def stop(epoch):
        if epoch.epoch == 2:
            raise TrainingError("stopped")

    with pytest.raises(TrainingError, match="stopped"):
        fit(configuration(), checkpoint=tmp_path / "checkpoint.pt", on_epoch=stop)
    use(monkeypatch, BlindMonitor)
    result = fit(configuration(), checkpoint=tmp_path / "checkpoint.pt")
    assert [epoch.joules for epoch in result.history] == [{"gpu": 5.0, "cpu": 4.0}] * 2 + [None]


@pytest.mark.parametrize("monitor", [None, BlindMonitor])
def test_nothing_is_written_where_nothing_is_measured(monkeypatch, monitor):
    use(monkeypatch, monitor)
    assert joule_meter()() is None
    result = fit(configuration(epochs=1))
    assert '"joules"' not in result.model_dump_json()
    assert "joules" not in result.history_table()
    use(monkeypatch, FakeMonitor)
    measured = fit(configuration(epochs=1))
    assert without_timings(measured) == without_timings(result)
    assert measured.config_hash == result.config_hash


def test_zeus_is_used_as_it_is():
    pytest.importorskip("zeus.monitor")
    joules = joule_meter()
    for found in (joules(), joules()):
        assert found is None or (found.keys() <= {"gpu", "cpu", "memory"} and min(found.values()) >= 0)
