from toy_engine import ToyPlugin

from engine.conformance import EngineConformance


class TestToyEngine(EngineConformance):
    plugin = ToyPlugin()
