"""Energy-aware training (arXiv 2307.00368): an activation penalty, an energy report, and a study of both."""

from importlib import import_module
from typing import Any

__version__ = "0.2.0"

_HOMES = {
    "ActivationPenalty": "penalties",
    "ConfigError": "config",
    "EnergyMeter": "energy",
    "RunConfig": "config",
    "RunResult": "results",
    "Study": "config",
    "StudyResults": "results",
    "build_model": "models",
    "energy_report": "energy",
    "evaluate": "training",
    "fit": "training",
    "load": "checkpoint",
    "load_data": "data",
    "tradeoff": "curve",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: the study's runner does without PyTorch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'eatlib' has no attribute {name!r}")
    return getattr(import_module(f"eatlib.{_HOMES[name]}"), name)
