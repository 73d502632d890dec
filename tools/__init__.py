"""fxopt.tools: the command line, the demo, benchmarks."""
