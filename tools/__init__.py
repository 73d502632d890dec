"""fxopt.tools: the command line, the demo, benchmarks."""

__all__: list[str] = []
