"""The parts of bench/gpu.py, one module each: `measure(work, report)`."""
