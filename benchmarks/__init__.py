"""What is measured (`registry`), how (`timing`), against whom (`peers`), and what is made of it (`numbers`, `plots`).

Installed as ``pyvideo_kernels.benchmarks`` and imported by that name alone. Its modules import each other relatively;
those that are run as ``python -m benchmarks.<name>`` import by the installed name, or they would load them twice.
"""
