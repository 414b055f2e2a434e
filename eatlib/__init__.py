"""Energy-aware training (arXiv 2307.00368): an activation penalty, an energy report, and a study of both."""

__version__ = "0.1.0"
