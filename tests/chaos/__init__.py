"""What survives what: scenarios that kill, stop, starve and mislead real processes, and count.

``python -m tests.chaos`` runs the long form of all, ``python -m tests.chaos kills --seeds 3`` of one.
Each prints one summary line and fails if something was lost or is unexplained.
"""
