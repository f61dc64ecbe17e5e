"""WHAT WOULD SPOIL A RUN, found before it: facts gathered in one place, judged in another.

``facts/`` ask the machine (files of the kernel, NVML, nsys, an interpreter) and judge nothing;
``probes/`` are pure functions from facts to findings; ``examine.py`` runs both. Nothing on the
machine is ever changed: a fix is a sentence for the user.
"""
