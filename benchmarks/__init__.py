"""What is measured, how, against whom, and what is made of it.

    registry, shapes, eager   ops: inputs at the models' sizes, bytes, FLOPs, the models' own code
    timing, backends          the clock: cold, in turns, as CUDA graphs
    profile, op_classes       where the time of a call goes
    ops, peers                ``pyvideo bench ops``, and the external kernels it measures against
    e2e, models               ``pyvideo bench e2e``: whole clips, and the models they run
    tune, campaign            launch configurations for a card; everything about a card in slices
    results, report           result files; tables and plots of them
    compare, numbers          the regression gate; docs/numbers.md

Installed as ``pyvideo_kernels.benchmarks`` and imported by that name alone. Modules import each other relatively;
those that are run as ``python -m benchmarks.<name>`` import by the installed name, or they would load them twice.
"""
