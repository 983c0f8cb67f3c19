"""Benchmarks: speed (`benchmarks.run`), quality (`benchmarks.quality`) and memory (`benchmarks.memory`)."""
