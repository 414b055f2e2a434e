"""Energy-aware training (arXiv 2307.00368): an activation penalty, an energy report, and a study of both."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eatlib.config import ConfigError, RunConfig, Study
    from eatlib.data import load_data
    from eatlib.energy import EnergyMeter, energy_report
    from eatlib.models import build_model
    from eatlib.penalties import ActivationPenalty
    from eatlib.results import RunResult
    from eatlib.training import evaluate, fit, load

__version__ = "0.1.0"

_HOMES = {
    "ActivationPenalty": "penalties",
    "ConfigError": "config",
    "EnergyMeter": "energy",
    "RunConfig": "config",
    "RunResult": "results",
    "Study": "config",
    "build_model": "models",
    "energy_report": "energy",
    "evaluate": "training",
    "fit": "training",
    "load": "training",
    "load_data": "data",
}
__all__ = [
    "ActivationPenalty",
    "ConfigError",
    "EnergyMeter",
    "RunConfig",
    "RunResult",
    "Study",
    "build_model",
    "energy_report",
    "evaluate",
    "fit",
    "load",
    "load_data",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: the study's runner does without PyTorch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'eatlib' has no attribute {name!r}")
    return getattr(import_module(f"eatlib.{_HOMES[name]}"), name)
