"""What every engine plugin has to pass; needs pytest."""

from engine.conformance.suite import EngineConformance

__all__ = ["EngineConformance"]
